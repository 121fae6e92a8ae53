"""Merged LoRA: the same values and gradients as the two branches of peft."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from training_problems import PROBLEMS

from codi import CodiModel
from codi.batches import collate
from codi.merged import MergedLora
from codi.training import DistillationLoss


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_lora_has_the_same_values_and_gradients(trainable: Callable[..., CodiModel], kind: str) -> None:
    model = trainable(kind, "original")
    batch = collate(PROBLEMS, model)
    grads = {}
    for merged in (False, True):
        loss = DistillationLoss(model, n_latents=2, merged=merged)
        loss.zero_grad()
        value = loss(batch)["total"]
        value.backward()
        grads[merged] = (float(value), {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None})
        if loss.lora is not None:
            loss.lora.remove()
    assert grads[True][0] == pytest.approx(grads[False][0], rel=1e-5)
    assert grads[True][1].keys() == grads[False][1].keys() != set()
    for name, gradient in grads[False][1].items():
        error = (grads[True][1][name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="no LoRA layers"):
        MergedLora(torch.nn.Linear(2, 2))
