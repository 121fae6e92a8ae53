"""`codi train`: the whole path at toy size, resume, and refusal of another configuration."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codi import load_codi
from experiments import train
from experiments.tasks import arithmetic

TOY = train.Config(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ffn=24, teacher_steps=3, steps=4, batch_size=4, micro_batch=2,
    lora_r=2, lora_alpha=2, prj_dim=8, n_latents=2, save_every=2, eval_every=0, eval_problems=4, device="cpu",
    precision="float32", direct_fraction=0.5,
)  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint" / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    train.main(replace(TOY, out=str(folder)))
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
        assert found == {(s, t) for s in range(1, steps + 1) for t in terms}


def test_an_interrupted_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TOY, out=str(tmp_path / "run"))
    whole = train.problems_of_step

    def failing(*arguments: object) -> object:
        if arguments[2:4] == ("distillation", 3):
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "problems_of_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    assert not (tmp_path / "run" / "checkpoint").exists()
    monkeypatch.setattr(train, "problems_of_step", whole)
    train.main(config)
    one, two = state(finished), state(tmp_path / "run")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], msg=name)


def test_another_configuration_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match="lora_r: 2 there, 3 here"):
        train.main(replace(TOY, out=str(finished), lora_r=3))


def test_a_published_base_needs_no_teacher(finished: Path, tmp_path: Path) -> None:
    """--init with a data file: the base stays where it is, and is frozen."""
    lines = [f"{p.question}||{' '.join(f'<<{s}>>' for s in p.steps)} #### {p.answer}" for p in arithmetic.generate(30)]
    data = tmp_path / "train.txt"
    data.write_text("\n".join(lines) + "\n")
    base = finished / "checkpoint" / "base"
    config = replace(TOY, out=str(tmp_path / "run"), init=str(base), data=str(data), steps=2, epochs=0)
    train.main(config)
    assert not (tmp_path / "run" / "teacher.pt").exists()
    model = load_codi(tmp_path / "run" / "checkpoint")
    assert model.protocol.question_suffix.startswith(" Output only the answer")
    key = "codi.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    torch.testing.assert_close(state(tmp_path / "run")[key].float(), state(finished)[key].float())


def test_batches_are_a_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> list[str]:
        config = replace(TOY, seed=seed)
        return [p.question for p in train.problems_of_step(config, None, "distillation", step, 10)]

    assert draw(0, 1) == draw(0, 1) != draw(0, 2)
    assert draw(1, 1) != draw(0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "batch-size must be a multiple of micro-batch, got 5 and 2"),
        ({"teacher_steps": 0}, "needs a teacher stage"),
        ({"data": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        train.main(replace(TOY, out=str(tmp_path / "run"), **changes))
