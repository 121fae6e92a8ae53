"""`codi tune` on a tiny random model: completions alone are learned, runs resume exactly, the adapter folder loads."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import make_base, make_tokenizer
from safetensors.torch import load_file

from codi.training import cosine_schedule
from experiments.tasks.reasoner import Sample, generate
from experiments.tune import run as tune
from experiments.tune.batches import (
    PHASES,
    SLACK,
    batches,
    collate,
    completion_loss,
    learning_rate,
    samples_of_step,
)  # fmt: skip
from experiments.tune.options import TuneOptions
from lm.adapters import add_adapter, save_adapter
from lm.errors import UserError
from lm.load import load_lm
from lm.model import LanguageModel


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer as a folder of Hugging Face."""
    folder = tmp_path_factory.mktemp("models") / "base"
    make_base("llama").save_pretrained(folder)
    make_tokenizer(named=False).save_pretrained(folder)
    return folder


@pytest.fixture
def options(base_folder: Path, tmp_path: Path) -> TuneOptions:
    return TuneOptions(
        out=tmp_path / "run", model=str(base_folder), steps=6, batch_size=4, micro_batch=2, lr=2e-2, lora_r=4,
        device="cpu", precision="float32", save_every=1, eval_every=0, demonstrated=0.3, demonstrations=1,
    )  # fmt: skip


def weights_of(options: TuneOptions) -> dict[str, Any]:
    return load_file(options.target / "adapter_model.safetensors")


# --- Samples and loss -------------------------------------------------------------------------------------------------


def test_samples_of_a_step_depend_on_seed_and_step_alone(options: TuneOptions) -> None:
    assert samples_of_step(options, 3) == samples_of_step(options, 3)
    assert samples_of_step(options, 3) != samples_of_step(options, 4)
    assert samples_of_step(options, 3) != samples_of_step(dataclasses.replace(options, seed=1), 3)
    many = dataclasses.replace(options, batch_size=400, demonstrated=0.25, demonstrations=2)
    shown = [sample for sample in samples_of_step(many, 0) if sample.prompt.count("### Input") > 1]
    assert 30 < len(shown) < 110 and all(sample.mode == "steps" for sample in shown)
    none = dataclasses.replace(many, demonstrated=0.0, steps=16)
    assert not any(sample.prompt.count("### Input") > 1 for sample in samples_of_step(none, 0))
    early, late = (samples_of_step(none, step) for step in (5, 6))  # three eighths of 16 steps
    rare = [sum(sample.task == "babi-16" for sample in some) for some in (early, late)]
    assert 20 < rare[0] < 60 < rare[1] < 110


def test_the_learning_rate_begins_anew_in_the_last_phase() -> None:
    rates = [learning_rate(step, 640) for step in range(640)]
    assert rates[:420] == [cosine_schedule(step, 640) for step in range(420)] and max(rates) == 1.0
    assert rates[419] < 0.3 and rates[420] == 0.6 and rates[639] < 1e-3
    assert all(a >= b for a, b in zip(rates[420:], rates[421:], strict=False))
    assert [phase.begins * 640 for phase in PHASES] == [0, 240, 420]


def test_only_the_completion_is_learned(language_model: Callable[..., LanguageModel]) -> None:
    """The loss is that of the completion's tokens and the end; no token of the prompt is a target."""
    model = language_model()
    samples = generate(3, 0, "train", "ontology-1")
    batch = collate(model.tokenizer, samples)
    expected = 0.0
    for sample in samples:
        prompt = model.tokenizer(sample.prompt)["input_ids"]
        text = model.tokenizer(sample.prompt + sample.completion)["input_ids"] + [model.tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model.base(torch.tensor([text])).logits[0].log_softmax(-1)
        expected -= sum(float(logs[at - 1, text[at]]) for at in range(len(prompt), len(text)))
    assert len(batch.targets) == sum(len(sample.completion) + 1 for sample in samples)  # a token per byte
    with torch.no_grad():
        assert float(completion_loss(model.base, batch)) == pytest.approx(expected, rel=1e-5)
    assert batch.targets.tolist().count(model.tokenizer.eos_token_id) == len(samples)


def test_batches_hold_every_sample_once_and_texts_of_similar_length(
    language_model: Callable[..., LanguageModel], options: TuneOptions
) -> None:
    model = language_model()
    samples = samples_of_step(dataclasses.replace(options, batch_size=40), 0)
    parts = list(batches(model.tokenizer, samples, 8))
    ends = [row for part in parts for row in part.rows.unique().tolist()]
    assert len(ends) == 40 and max(len(part.input_ids) for part in parts) <= 8
    with torch.no_grad():
        whole = sum(float(completion_loss(model.base, part)) for part in parts)
        assert whole == pytest.approx(float(completion_loss(model.base, collate(model.tokenizer, samples))), rel=1e-4)
    for part in parts:
        lengths = [int(part.columns[part.rows == row].max()) + 2 for row in range(len(part.input_ids))]
        assert max(lengths) <= SLACK * min(lengths)
    with pytest.raises(ValueError, match="at least one sample"):
        collate(model.tokenizer, [])


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_the_loss_falls(options: TuneOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "NEW_TOKENS", 2)
    options = dataclasses.replace(options, steps=25, eval_every=25, eval_samples=1)
    tune.run(options)
    log = pd.read_csv(options.out / "log.csv")["value"]
    assert len(log) == 25 and log[-5:].mean() < 0.8 * log[:3].mean()
    table = pd.read_csv(options.out / "accuracy.csv")
    assert len(table) == 18 and set(table["step"]) == {25} and table["accuracy"].between(0, 1).all()


def test_an_interrupted_run_is_one_run(options: TuneOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tune.run(options)
    whole, log = weights_of(options), pd.read_csv(options.out / "log.csv")
    other = dataclasses.replace(options, out=tmp_path / "other", save_every=2)
    real = tune.samples_of_step

    def stopped(given: TuneOptions, step: int) -> list[Sample]:
        if step == 3:
            raise KeyboardInterrupt
        return real(given, step)

    monkeypatch.setattr(tune, "samples_of_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.run(other)
    assert not other.target.exists()
    monkeypatch.setattr(tune, "samples_of_step", real)
    random.seed(5)
    torch.manual_seed(5)  # of no consequence
    tune.run(other)
    again = pd.read_csv(other.out / "log.csv")
    pd.testing.assert_frame_equal(log.drop(columns="seconds"), again.drop(columns="seconds"))
    assert all(torch.equal(whole[name], weight) for name, weight in weights_of(other).items())
    third = dataclasses.replace(options, out=tmp_path / "third", seed=1)
    tune.run(third)
    assert not all(torch.equal(whole[name], weight) for name, weight in weights_of(third).items())
    with pytest.raises(ValueError, match=r"options\.lr"):
        tune.run(dataclasses.replace(options, lr=1e-3))


# --- The adapter ------------------------------------------------------------------------------------------------------


def adapted(base_folder: Path, seed: int = 0) -> tuple[LanguageModel, Any]:
    """The base with a random adapter whose weights bfloat16 holds exactly."""
    model = load_lm(str(base_folder), form="response")
    torch.manual_seed(seed)
    with_adapter = add_adapter(model.base, 4, 8)
    with torch.no_grad():
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter).mul(0.1).bfloat16())
    return model, with_adapter


def test_the_folder_loads_as_the_trained_model(base_folder: Path, tmp_path: Path) -> None:
    model, with_adapter = adapted(base_folder)
    folder = base_folder.parent / "adapter"
    save_adapter(with_adapter, folder, base=str(base_folder), base_hash=model.weights_hash, form="response")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert {weight.dtype for weight in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_lm(str(folder))
    assert loaded.form == "response" and loaded.name == "adapter"
    batch = loaded.encode(["### Input: Is it so?\n### Response:", "x"])
    with torch.no_grad():
        found, wanted, untouched = (
            one(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.positions).logits
            for one in (loaded.base, model.base, load_lm(str(base_folder)).base)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - untouched).abs().max() > 0.01


def test_another_base_is_said_in_one_line(base_folder: Path, tmp_path: Path) -> None:
    _, with_adapter = adapted(base_folder)
    save_adapter(with_adapter, tmp_path / "a", base=str(base_folder), base_hash="0" * 64, form="response")
    with pytest.warns(UserWarning, match="was trained on other weights than those of .*recorded 000000000000, found"):
        load_lm(str(tmp_path / "a"))
    (tmp_path / "a" / "lm.json").write_text('{"form": "response", "base": {"weights_hash": 3}}')
    with pytest.raises(UserError, match="base must hold the text weights_hash"):
        load_lm(str(tmp_path / "a"))
    (tmp_path / "a" / "lm.json").write_text('{"form": "verse"}')
    with pytest.raises(UserError, match="form must be one of plain, chat, response, got 'verse'"):
        load_lm(str(tmp_path / "a"))
    (tmp_path / "a" / "lm.json").write_text('{"form": "response"}')  # of an adapter that does not know its base
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_lm(str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"demonstrated": 1.5}, "demonstrated is a share between 0 and 1, got 1.5"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lora_r": 0}, "lora-r must be at least 1, got 0"),
    ],
)
def test_impossible_options(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        TuneOptions(**changes)
