"""`codi train`: the whole path at toy size, resume, and refusal of another configuration."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from codi import load_codi
from experiments.study.result import Result
from experiments.tasks import arithmetic
from experiments.train import data as training_data
from experiments.train import stage as training_stage
from experiments.train.options import Resolved, TrainOptions, micro_batch_of, resolve
from experiments.train.run import main

TOY = TrainOptions(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=24, teacher_steps=3, steps=4, batch_size=4, micro_batch=2,
    lora_r=2, lora_alpha=2, prj_dim=8, n_latents=2, save_every=2, eval_every=0, eval_problems=4, device="cpu",
    precision="float32", direct_fraction=0.5, direct_weight=0.1,
)  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint" / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    main(replace(TOY, out=folder))
    return folder


def test_a_checkpoint_that_loads_and_answers(finished: Path) -> None:
    model = load_codi(finished / "checkpoint")
    assert model.n_latents == 2 and model.protocol.name == "answer-only" and model.protocol.question_suffix == ""
    assert len(model.answer([p.question for p in arithmetic.generate(3)], max_new_tokens=3)) == 3
    settings = json.loads((finished / "checkpoint" / "codi.json").read_text())
    assert settings["training"]["steps"] == 4 and str(finished) not in json.dumps(settings)


def test_every_loss_term_of_every_step_is_logged(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "log.csv").open()))
    for stage, steps, terms in (
        ("teacher", 3, {"teacher", "direct", "total"}),
        ("distillation", 4, {"student", "distillation", "teacher", "direct", "total"}),
    ):
        found = {(int(r["step"]), r["term"]) for r in rows if r["stage"] == stage}
        guided = {entry for entry in found if entry[1] == "step"}
        assert guided == ({(1, "step"), (2, "step"), (3, "step")} if stage == "distillation" else set())  # until 75 %
        found -= guided
        assert found == {(s, t) for s in range(1, steps + 1) for t in terms}


def test_an_interrupted_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TOY, out=tmp_path / "run")
    whole = training_data.problems_of_step

    def failing(*arguments: object) -> object:
        if arguments[2:4] == ("distillation", 3):
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training_stage, "problems_of_step", failing)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.setattr(training_stage, "problems_of_step", whole)
    main(config)
    one, two = state(finished), state(tmp_path / "run")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], msg=name)


def test_steps_that_come_again_are_logged_once(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    whole = (folder / "log.csv").read_text()
    state_file = folder / "distillation.pt"
    saved = torch.load(state_file, weights_only=True)
    torch.save(saved | {"step": 2}, state_file)  # as after a crash: two steps logged beyond the last state
    main(replace(TOY, out=folder))

    def keys(text: str) -> list[str]:
        return [line.rsplit(",", 3)[0] for line in text.splitlines()]

    assert keys((folder / "log.csv").read_text()) == keys(whole)


def test_another_configuration_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"options\.lora_r: 2 -> 3"):
        main(replace(TOY, out=finished, lora_r=3))


def test_a_published_base_needs_no_teacher(finished: Path, tmp_path: Path) -> None:
    """--init with a data file: the base stays where it is, and is frozen."""
    lines = [f"{p.question}||{' '.join(f'<<{s}>>' for s in p.steps)} #### {p.answer}" for p in arithmetic.generate(30)]
    data = tmp_path / "train.txt"
    data.write_text("\n".join(lines) + "\n")
    base = finished / "checkpoint" / "base"
    config = replace(TOY, out=tmp_path / "run", init=str(base), data=str(data), steps=2, teacher_steps=None)
    main(config)
    assert not (tmp_path / "run" / "teacher.pt").exists()
    model = load_codi(tmp_path / "run" / "checkpoint")
    assert model.protocol.question_suffix.startswith(" Output only the answer")
    key = "codi.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    torch.testing.assert_close(state(tmp_path / "run")[key].float(), state(finished)[key].float())


def test_polynomial_problems_from_scratch(tmp_path: Path) -> None:
    """Another generator: its own words are tokens, training never sees a held-out sequence, hops go by the weights."""
    weights = (0.0, 1.0, 1.0, 0.0, 0.0)
    config = replace(
        TOY, out=tmp_path / "run", data="polynomial:m=31,b=2", first_weights=weights, last_weights=weights
    )  # fmt: skip
    main(config)
    model = load_codi(tmp_path / "run" / "checkpoint")
    problems, held_out, _ = training_data.load_data(resolve(config), model)
    assert problems is None and {len(p.steps) for p in held_out} == {3} and "Modulo 31." in held_out[0].question
    seen = training_data.problems_of_step(resolve(config), None, "distillation", 0, 4)
    assert {len(p.steps) for p in seen} <= {2, 3} and all("Modulo 31." in p.question for p in seen)
    assert all("-train-" in p.prompt_id for p in seen) and all("-test-" in p.prompt_id for p in held_out)
    words = model.tokenizer.tokenize("Times 12 plus 2. Modulo 31.")
    assert len(words) == len(["Times", " ", "12", " plus", " ", "2", ".", " Modulo", " ", "31", "."])
    settings = json.loads((tmp_path / "run" / "checkpoint" / "codi.json").read_text())
    assert settings["training"]["data"] == "polynomial:m=31,b=2"


def test_held_out_problems_are_as_long_as_those_of_training(finished: Path) -> None:
    model = load_codi(finished / "checkpoint")

    def lengths(*last: float) -> set[int]:
        config = resolve(replace(TOY, eval_problems=40, last_weights=last))
        return {len(problem.steps) for problem in training_data.load_data(config, model)[1]}

    assert lengths(0.5, 0.8, 1.2, 1.3, 1.3) == {3, 4, 5} and lengths(0, 1, 0, 0, 0) == {2}
    assert lengths(1, 1, 0, 1, 0) == {4}
    old = arithmetic.generate(4, seed=1, split="test", min_steps=3)
    assert training_data.load_data(resolve(TOY), model)[1] == old


def test_a_teacher_is_taken_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    main(replace(TOY, out=tmp_path / "run", teacher=str(finished / "checkpoint"), teacher_steps=None))
    before, after = state(finished), state(tmp_path / "run")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        trained = "lora_" in name or name.startswith("prj.")
        assert trained or torch.equal(weight, after[name]), name
    assert not torch.equal(before["prj.1.weight"], after["prj.1.weight"])  # begun anew
    for side in ("base/model.safetensors", "base/tokenizer.json", "tokenizer.json"):
        copies = [folder / "checkpoint" / side for folder in (finished, tmp_path / "run")]
        assert copies[0].read_bytes() == copies[1].read_bytes(), side
    assert load_codi(tmp_path / "run" / "checkpoint").protocol == load_codi(finished / "checkpoint").protocol
    log = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert {row["stage"] for row in log} == {"distillation"}


def test_batches_are_a_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> list[str]:
        config = resolve(replace(TOY, seed=seed))
        return [p.question for p in training_data.problems_of_step(config, None, "distillation", step, 10)]

    assert draw(0, 1) == draw(0, 1) != draw(0, 2)
    assert draw(1, 1) != draw(0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch-size must be a multiple of micro-batch, got 5 and 2"),
        ({"teacher_steps": 0}, "needs a teacher stage"),
        ({"data": "nowhere.txt"}, "nowhere.txt"),
        ({"steps": None, "epochs": 2.0}, "needs a finite data set"),
        ({"steps": 3, "epochs": 2.0}, "--steps or --epochs, not both: got 3 and 2"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"data": "polynomial:m=500"}, "the modulus m must be in 2..199, got 500"),
        ({"data": "polynomial", "steps": None, "epochs": 2.0}, "needs a finite data set"),
        ({"last_weights": (0.0,) * 5}, "last-weights must be 5 numbers of 0 or more, not all 0"),
        ({"first_weights": (1.0, 2.0)}, "first-weights must be 5 numbers of 0 or more"),
        ({"init": "no/such-base"}, "base model no/such-base is neither a folder"),
        ({"lora_dropout": 0.1}, "lora-dropout 0.1 cannot act on merged weights: give --merged False"),
        ({"lora_dropout": 1.0}, "lora-dropout must be a fraction below 1, got 1"),
        ({"step_latents": "4:1"}, "latents of step-latents must be in 1..3"),
        ({"lora_modules": ("q_proj", "c_attn")}, "LoRA modules must be among q_proj, .*, got 'c_attn'"),
        ({"teacher_lora": True}, "adapter of a given base: give --init"),
        ({"checkpoint": "trained"}, "needs a base that stays as it is: give --init"),
        ({"frozen_teacher": True, "problems": 9}, "needs --teacher-weight 0, got 10"),
        ({"frozen_teacher": True, "teacher_weight": 0.0}, "'arithmetic' is endless: give --problems"),
        ({"teacher": "checkpoints/tiny"}, "neither --init nor --teacher-steps can be given; got 3"),
        ({"teacher": "no/such-model", "teacher_steps": None}, "no/such-model"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        main(replace(TOY, out=tmp_path / "run", **changes))


def test_the_run_folder(finished: Path, tmp_path: Path) -> None:
    """A run like any other: manifest and result; foreign folders are refused, those of early versions go on."""
    manifest = json.loads((finished / "manifest.json").read_text())
    settings = json.loads((finished / "config.json").read_text())
    assert manifest["identity"] == {"study": "train", "format": 1, "options": settings} and manifest["sittings"]
    result = Result.read(finished)
    assert result.study == "train" and set(result.tables["losses"]["stage"]) == {"teacher", "distillation"}
    early = tmp_path / "early"
    shutil.copytree(finished, early, ignore=shutil.ignore_patterns("manifest.json", "result.json", "summary.md"))
    with pytest.raises(ValueError, match=r"other options.*options\.lora_r: 2 -> 3"):
        main(replace(TOY, out=early, lora_r=3))
    with pytest.raises(ValueError, match=r"other options.*options\.lora_r: 2 -> 3"):
        replace(TOY, out=early, lora_r=3).check_inputs()
    assert not (early / "manifest.json").exists()
    main(replace(TOY, out=early))
    assert json.loads((early / "manifest.json").read_text())["fingerprint"] == manifest["fingerprint"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not a run folder"):
        main(replace(TOY, out=tmp_path / "notes"))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


# --- Presets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> dict[str, str]:
    """Folders of untrained base models with a tokenizer, by model type."""
    tokenizer = AutoTokenizer.from_pretrained(finished / "checkpoint" / "base")
    torch.manual_seed(0)
    size = len(tokenizer)
    models = {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
            )
        ),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=256, eos_token_id=tokenizer.eos_token_id
            )
        ),
    }  # fmt: skip
    folders = {}
    for kind, model in models.items():
        folders[kind] = str(tmp_path_factory.mktemp("base") / kind)
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finite data set of 40 problems with written chains."""
    lines = [f"{p.question}||{' '.join(f'<<{s}>>' for s in p.steps)} #### {p.answer}" for p in arithmetic.generate(40)]
    path = tmp_path_factory.mktemp("data") / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_published_settings_are_those_of_the_base(bases: dict[str, str], data: str) -> None:
    """Shen et al. 2025: rank 128, alpha 32, decay 0.1, clip 2, batch 128; answer-only adds direct answers."""
    llama = resolve(TrainOptions(init=bases["llama"], data=data))
    assert (llama.lr, llama.epochs, llama.kd_weight, llama.prj_dim) == (8e-4, 10, 20, 2048)
    gpt2 = resolve(TrainOptions(init=bases["gpt2"], data=data, protocol="original"))
    assert (gpt2.lr, gpt2.epochs, gpt2.kd_weight, gpt2.prj_dim) == (3e-3, 40, 1, 768)
    for found in (llama, gpt2):
        assert (found.lora_r, found.lora_alpha, found.weight_decay, found.clip) == (128, 32, 0.1, 2.0)
        assert (found.batch_size, found.teacher_weight, found.teacher_fraction) == (128, 1, 1)
        assert found.teacher_steps == 0 and not found.merged and not found.last_step
        assert found.step_weight == 0 and found.decoder_weight == 0 and found.lora_dropout == 0.1
    assert llama.direct_fraction * llama.direct_weight == 1 and gpt2.direct_fraction == 0
    tiny = resolve(TrainOptions())
    assert tiny == Resolved(preset="tiny") and tiny.merged and tiny.teacher_steps > 0


def test_what_is_given_beats_the_preset_even_where_it_is_the_default_of_another(
    bases: dict[str, str], data: str
) -> None:
    tiny = Resolved()
    given = {
        "lora_r": tiny.lora_r,
        "micro_batch": tiny.micro_batch,
        "merged": True,
        "lora_dropout": 0.0,
        "teacher_steps": 5,
    }
    found = resolve(TrainOptions(init=bases["llama"], data=data, **given))  # type: ignore[arg-type]
    assert {name: getattr(found, name) for name in given} == given and found.lora_alpha == 32
    assert resolve(TrainOptions(init=bases["llama"], data=data, steps=7)).epochs == 0
    assert resolve(TrainOptions(init=bases["llama"])).epochs == 0  # the generator has no end


@pytest.mark.parametrize(
    ("kind", "protocol", "precision"),
    [("llama", "answer-only", "bf16"), ("gpt2", "original", "bf16"), ("gpt2", "original-eos", "float32")],
)
def test_published_path(
    bases: dict[str, str], data: str, tmp_path: Path, kind: str, protocol: str, precision: str
) -> None:
    """A given base, LoRA kept apart, finite data by epochs: the checkpoint has the base weights and a trained LoRA."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than the tests before
    config = TrainOptions(
        out=tmp_path / "run", init=bases[kind], data=data, protocol=protocol, precision=precision, device="cpu",
        epochs=2, batch_size=8, micro_batch=4, lora_r=2, prj_dim=8, n_latents=2, eval_every=0, eval_problems=8,
    )  # type: ignore[arg-type]  # fmt: skip
    main(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert max(int(r["step"]) for r in rows) == 2 * (32 // 8)
    assert ("direct" in {r["term"] for r in rows}) == (protocol == "answer-only")
    model = load_codi(tmp_path / "run" / "checkpoint")
    assert model.protocol.name == protocol
    weights = state(tmp_path / "run")
    assert all(v.abs().sum() > 0 for k, v in weights.items() if "lora_B" in k)  # B starts at zero
    base = AutoModelForCausalLM.from_pretrained(bases[kind]).state_dict()
    key = "model.layers.1.mlp.up_proj" if kind == "llama" else "transformer.h.1.mlp.c_fc"
    want = base[f"{key}.weight"].to(torch.bfloat16 if precision == "bf16" else torch.float32)
    assert torch.equal(weights[f"codi.base_model.model.{key}.base_layer.weight"], want)


def test_a_pretrained_base_with_a_lora_teacher(bases: dict[str, str], tmp_path: Path) -> None:
    """A pool of word problems, targets found once; what is shipped is what was trained, and a stopped run goes on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = TrainOptions(
        out=tmp_path / "run", preset="smollm2", init=bases["llama"], data="word-problems", device="cpu", problems=24,
        teacher_steps=2, steps=4, batch_size=4, micro_batch=2, lora_r=2, prj_dim=8, n_latents=2, eval_every=0,
        eval_problems=4, length_window=3, lora_modules=("q_proj", "down_proj"), step_weight=1.0,
    )  # fmt: skip
    main(config)
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    terms = {r["term"] for r in rows if r["stage"] == "distillation"}
    assert terms == {"student", "distillation", "step", "total"}  # no teacher is trained along
    folder = tmp_path / "run" / "checkpoint"
    assert {path.name for path in folder.iterdir()} == {"codi.json", "trained.safetensors"}
    settings = json.loads((folder / "codi.json").read_text())
    assert settings["base"] == os.path.relpath(bases["llama"], folder) and len(settings["base_hash"]) == 64
    model = load_codi(folder)
    assert model.protocol.question_suffix == "" and model.n_latents == 2 and not model.notes
    weights = load_file(folder / "trained.safetensors")
    assert {name.split(".")[-4] for name in weights if "lora_B" in name} == {"q_proj", "down_proj"}
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)
    before = load_file(tmp_path / "run" / "targets.safetensors")
    assert before["target"].shape[0] == 24
    (tmp_path / "run" / "distillation.pt").unlink()
    (tmp_path / "run" / "targets.safetensors").unlink()
    main(config)  # the same teacher again, from its state file
    after = load_file(tmp_path / "run" / "targets.safetensors")
    torch.testing.assert_close(after["target"], before["target"])
    for name, value in load_file(folder / "trained.safetensors").items():
        torch.testing.assert_close(value, weights[name], msg=name)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_pool_of_problems_comes_again_in_batches_of_like_length(finished: Path) -> None:
    model = load_codi(finished / "checkpoint")
    config = resolve(replace(TOY, problems=40, length_window=5))
    pool, _, _ = training_data.load_data(config, model)
    assert pool is not None and len(pool) == 40

    def epoch(config: Resolved, number: int) -> list[list[str]]:
        steps = range(10 * number, 10 * (number + 1))
        return [[p.prompt_id for p in training_data.problems_of_step(config, pool, "x", s, 99)] for s in steps]

    names = sorted(p.prompt_id for p in pool)
    first, second = epoch(config, 0), epoch(config, 1)
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == names and first != second
    length = {p.prompt_id: len(p.question) + len(p.chain) for p in pool}

    def spread(batches: list[list[str]]) -> int:
        return sum(max(length[n] for n in batch) - min(length[n] for n in batch) for batch in batches)

    assert spread(first) < 0.5 * spread(epoch(replace(config, length_window=1), 0))
    config = resolve(replace(TOY, problems=40, epochs=2.0, steps=None))
    assert training_data.load_data(config, model)[2] == 20
    with pytest.raises(ValueError, match="at least one batch of 4, got 3"):
        training_data.load_data(resolve(replace(TOY, problems=3)), model)


def test_answers_are_written_in_full() -> None:
    def answer(value: int | float) -> str:
        return training_data.text_of(replace(arithmetic.generate(1)[0], answer=value), "number").answer_text

    assert [answer(v) for v in (12, 1234567.5, 0.00001, -3)] == ["12", "1234567.5", "0.00001", "-3"]


def test_the_last_equation_can_be_left_out() -> None:
    """Published training leaves it out: a teacher that has written the result only copies it."""
    problem = arithmetic.generate(1, min_steps=3)[0]
    assert training_data.text_of(problem, "number").chain == problem.chain
    *others, last = problem.steps
    short = training_data.text_of(problem, "number", last_step=False)
    assert short.chain == "".join(f"<<{step}>>" for step in others) and last not in short.chain
    assert short.answer_text == str(problem.answer)
    assert training_data.text_of(replace(problem, steps=()), "number", last_step=False).chain == ""


def test_the_step_term_leaves_in_time() -> None:
    shares = [training_stage.guidance(step, 1000) for step in (0, 499, 625, 750, 999)]
    assert shares == pytest.approx([1, 1, 0.5, 0, 0])
    sooner = [training_stage.guidance(step, 1000, 0.3) for step in (0, 199, 250, 300, 999)]
    assert sooner == pytest.approx([1, 1, 0.5, 0, 0])
    assert [training_stage.guidance(step, 1000, 1.5) for step in (0, 999)] == [1, 1]
    assert training_stage.guidance(0, 1000, 0.0) == 0


def test_held_out_problems_are_as_long_as_those_trained_on(finished: Path) -> None:
    model = load_codi(finished / "checkpoint")
    for weights, lengths in (((1, 1, 1, 1, 1), {3, 4, 5}), ((0, 0, 1, 0, 0), {3}), ((1, 1, 0, 0, 0), {2})):
        config = resolve(replace(TOY, last_weights=weights, eval_problems=20))
        assert {len(p.steps) for p in training_data.load_data(config, model)[1]} == lengths


def test_an_auxiliary_decoder_is_trained_and_left_out(tmp_path: Path) -> None:
    main(replace(TOY, out=tmp_path / "run", decoder_weight=1.0, step_weight=0.0))
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    found = [float(row["value"]) for row in rows if row["term"] == "decoder"]
    assert len(found) == 4 and all(value > 0 for value in found)
    assert any("decoder" in name for name in torch.load(tmp_path / "run" / "distillation.pt")["weights"])
    assert not any("decoder" in name for name in state(tmp_path / "run"))
    load_codi(tmp_path / "run" / "checkpoint")


def test_dropout_acts_while_training_only_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TOY, lora_dropout=0.5, merged=False, save_every=1, teacher_steps=1)
    main(replace(config, out=tmp_path / "one"))
    main(replace(config, out=tmp_path / "none", lora_dropout=None))
    whole = training_data.problems_of_step

    def failing(*arguments: object) -> object:
        if arguments[2:4] == ("distillation", 2):
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training_stage, "problems_of_step", failing)
    with pytest.raises(KeyboardInterrupt):
        main(replace(config, out=tmp_path / "two"))
    monkeypatch.setattr(training_stage, "problems_of_step", whole)
    main(replace(config, out=tmp_path / "two"))
    one, two, none = (state(tmp_path / name) for name in ("one", "two", "none"))
    assert any(not torch.equal(one[name], none[name]) for name in one)  # it does act
    for name in one:
        torch.testing.assert_close(two[name], one[name], msg=name)


# --- Several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "micro", "ranks", "size"), [(128, 16, 8, 16), (128, 64, 8, 16), (12, 2, 3, 2)])
def test_processes_share_a_batch(batch: int, micro: int, ranks: int, size: int) -> None:
    config = resolve(replace(TOY, batch_size=batch, micro_batch=micro))
    assert micro_batch_of(config, ranks) == size
    problems = arithmetic.generate(batch)
    shares = [list(training_data.micro_batches(problems, size, rank, ranks)) for rank in range(ranks)]
    assert {len(part) for share in shares for part in share} == {size}
    assert len({len(share) for share in shares}) == 1
    seen = [p.prompt_id for share in shares for part in share for p in part]
    assert sorted(seen) == sorted(p.prompt_id for p in problems)


def test_processes_that_cannot_share_a_batch() -> None:
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 128"):
        micro_batch_of(resolve(replace(TOY, batch_size=128)), 3)
    with pytest.raises(ValueError, match=r"multiple of micro-batch, got 12 \(6 per process\) and 4"):
        micro_batch_of(resolve(replace(TOY, batch_size=12, micro_batch=4)), 2)


def launch(config: TrainOptions, processes: int) -> subprocess.CompletedProcess[str]:
    """`codi train` in several processes on the CPU."""
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in vars(config).items()
        if value is not None and not isinstance(value, (bool, tuple)) and value != ""
    ]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         "-m", "experiments.train", *options],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CODI_DEBUG": "1"},
    )  # fmt: skip


def test_two_processes_train_together(tmp_path: Path) -> None:
    """The mean over both shares is the mean over the batch, so two processes learn what one learns; and they go on.

    One problem per micro-batch: then the mean over micro-batches does not depend on how they are dealt out.
    """
    config = replace(TOY, batch_size=4, micro_batch=1, teacher_steps=1, steps=2, save_every=1, direct_fraction=0.0)
    main(replace(config, out=tmp_path / "one"))
    # two processes go on from the teacher that one has trained
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("checkpoint", "distillation.pt"))
    together = launch(replace(config, out=tmp_path / "two"), 2)
    assert together.returncode == 0, together.stderr[-2000:]
    assert together.stdout.count("checkpoint written") == 1  # by the main process alone
    main(replace(config, out=tmp_path / "half", batch_size=2))  # what one of them would learn alone
    learnt = {
        name: torch.cat([v.flatten() for k, v in state(tmp_path / name).items() if "lora_B" in k])
        for name in ("one", "two", "half")
    }
    scale = learnt["one"].norm()
    assert scale > 0
    assert (learnt["two"] - learnt["one"]).norm() < 0.05 * scale
    assert (learnt["half"] - learnt["one"]).norm() > 0.2 * scale
