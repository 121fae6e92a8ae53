"""The auxiliary decoder: it learns to read vectors, and padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from codi import CodiModel
from codi.decoder import StepDecoder

IDS = torch.tensor([[60, 61, 62, 63], [70, 71, 0, 0], [80, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_latent_counts_once_and_padding_never(tiny_model: Callable[..., CodiModel], kind: str) -> None:
    model = tiny_model(kind, "original")
    torch.manual_seed(0)
    decoder, latents = StepDecoder(model), torch.randn(3, model.d_model)
    together = decoder(model, latents, IDS, MASK)
    alone = [decoder(model, latents[[i]], IDS[[i], :n], MASK[[i], :n]) for i, n in enumerate((4, 2, 1))]
    assert float(together) == pytest.approx(float(sum(alone)) / 3, rel=1e-5)


def test_it_learns_to_write_what_a_latent_stands_for(tiny_model: Callable[..., CodiModel]) -> None:
    """Which step is written can be told from the latent alone: with the latents exchanged it is wrong."""
    model = tiny_model()
    torch.manual_seed(0)
    decoder, latents = StepDecoder(model, 1), torch.randn(3, model.d_model)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    first = float(decoder(model, latents, IDS, MASK))
    for _ in range(60):
        optimizer.zero_grad()
        decoder(model, latents, IDS, MASK).backward()
        optimizer.step()
    last = float(decoder(model, latents, IDS, MASK))
    assert last < 0.2 * first and float(decoder(model, latents.roll(1, 0), IDS, MASK)) > 5 * last


def test_mistakes(tiny_model: Callable[..., CodiModel]) -> None:
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        StepDecoder(tiny_model(), 0)
