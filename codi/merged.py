"""LoRA layers computed with their merged weight: for small models half the arithmetic of the two-branch form.

Knows nothing about losses or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MergedLora"]


class MergedLora:
    """Compute LoRA layers with their merged weight, W + scale · B A, formed once per training step.

    Same function and same gradients as the two-branch form; for small models, whose rank is not small beside d_model,
    half the arithmetic. Gradients reach A and B through the product. Without effect on what is saved.

    Args:
        base: model with LoRA layers.
        dtype: in which the merged weights are used.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.layers: list[Any] = [m for m in base.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        if not self.layers:
            raise ValueError("the model has no LoRA layers to merge")
        for layer in self.layers:
            layer.forward = _MergedForward(layer)
        self.refresh()

    def refresh(self) -> None:
        """Form the merged weights from the present LoRA weights, in float32."""
        with torch.autocast(self.layers[0].base_layer.weight.device.type, enabled=False):
            for layer in self.layers:
                weight = layer.base_layer.weight
                delta = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
                layer.forward.weight = (
                    weight + (delta.T if delta.shape != weight.shape or _transposed(layer) else delta)
                ).to(self.dtype)

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            del layer.forward


def _transposed(layer: Any) -> bool:
    """GPT-2's Conv1D holds its weight as (in, out)."""
    return type(layer.base_layer).__name__ == "Conv1D"


class _MergedForward:
    def __init__(self, layer: Any) -> None:
        self.bias = layer.base_layer.bias
        self.transposed = _transposed(layer)
        self.weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x, self.weight.T if self.transposed else self.weight, bias)
