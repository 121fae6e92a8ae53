"""Targets found beforehand: what the teacher would give, whatever is computed beside it, and a loss that uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from training_problems import PROBLEMS, Text

from codi import CodiModel
from codi.batches import collate
from codi.targets import Targets, find_targets
from codi.training import DistillationLoss

NAMES = ["a", "b", "c"]


def losses(model: CodiModel, targets: Targets | None, **options: float) -> dict[str, float]:
    batch = collate(PROBLEMS, model)
    batch = batch if targets is None else targets.put(batch, NAMES)
    loss = DistillationLoss(
        model, n_latents=3, direct_fraction=0.0, merged=False, step_weight=1.0, teacher_weight=0.0, **options
    )  # type: ignore[arg-type]
    return {name: float(value.detach()) for name, value in loss(batch).items()}


@pytest.mark.parametrize(("kind", "batch_size"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
def test_stored_targets_give_the_loss_of_a_teacher_that_is_asked(
    trainable: Callable[..., CodiModel], kind: str, batch_size: int
) -> None:
    model = trainable(kind, "original")
    targets = find_targets(model, PROBLEMS, NAMES, batch_size, torch.float32)
    stored, asked = losses(model, targets), losses(model, None)
    assert stored.keys() == asked.keys() == {"student", "distillation", "step", "total"}
    for name, value in asked.items():
        assert stored[name] == pytest.approx(value, rel=1e-4), name
    mixed = replace(targets, rows={"a": 2, "b": 0, "c": 1})
    assert losses(model, mixed)["distillation"] != pytest.approx(asked["distillation"], rel=1e-3)


def test_a_teacher_that_has_gone_on_is_not_asked(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    targets = find_targets(model, PROBLEMS, NAMES, 2, torch.float32)
    with torch.no_grad():
        for name, parameter in model.base.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    again = find_targets(model, PROBLEMS, NAMES, 2, torch.float32)
    assert not torch.allclose(targets.target, again.target, atol=1e-2)
    assert losses(model, again)["distillation"] == pytest.approx(losses(model, None)["distillation"], rel=1e-4)
    assert losses(model, targets)["distillation"] != pytest.approx(losses(model, None)["distillation"], rel=1e-2)


def test_problems_without_steps_and_names_that_are_not_there(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    targets = find_targets(model, [*PROBLEMS, Text("5?", "", "5")], [*NAMES, "d"], 2, torch.bfloat16)
    assert targets.target.dtype == torch.bfloat16 and targets.steps.shape[1] == 2
    assert not targets.steps[3].any() and not targets.steps[1, 1].any() and targets.steps[1, 0].any()
    with pytest.raises(KeyError):
        targets.put(collate(PROBLEMS, model), ["a", "b", "e"])


def test_a_teacher_that_is_trained_has_none(trainable: Callable[..., CodiModel]) -> None:
    model = trainable()
    targets = find_targets(model, PROBLEMS, NAMES, 3, torch.float32)
    with pytest.raises(ValueError, match="teacher_weight must be 0"):
        DistillationLoss(model, n_latents=1, merged=False)(targets.put(collate(PROBLEMS, model), NAMES))
