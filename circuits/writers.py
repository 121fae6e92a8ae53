"""Who writes the answer: what every head adds to the logit of a token, and what its output alone says.

The residual stream after the last block is a sum: token embedding, what each head adds, output biases, MLPs. The final
norm divides that sum by one number per item, its scale; at that scale, which is that of the item's own whole stream,
the norm is linear (centring included, where it centres), so that the contributions to a logit add up to the logit
exactly. That is the *direct* share only: what later parts make of a head's output is not in it, and a head that were
silenced would change the scale. Logits here are those of the unembedding, before any scaling or capping of logits.

*Alone*: a head's output normed at its own scale, through the unembedding: the probability of the token, the published
measure of an answer-writing head. It does not say how loud the head is; the contribution does.

Knows nothing about tasks. Source: nostalgebraist 2020 (logit lens); Elhage et al. 2021, A Mathematical Framework for
Transformer Circuits; Dutta et al. 2024, arXiv 2402.18312 (answer-writing heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits.heads import Heads
from circuits.knockout import ReferenceMeans, knocked_out
from lm.errors import UserError
from lm.model import LanguageModel
from lm.text import EncodedBatch

__all__ = ["FrozenNorm", "Writing", "ablated_probability", "alone", "answer_direction", "writing"]


class FrozenNorm:
    """The final norm of a model as the linear map that it is at a given scale.

    N(x) = gain · centred(x) / s(x) + bias, with centring or without (layer norm, RMS norm, Gemma's). Which it is, the
    gain and the bias are found by putting vectors in, so that no kind of norm has to be known.

    Raises:
        ValueError: a norm that is not of this form.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.norm: nn.Module = model.final_norm
        d, device, dtype = model.d_model, model.device, model.dtype
        signs = torch.ones(d, dtype=torch.float64)
        signs[1::2] = -1
        if d % 2:
            signs[-1] = 0
        size = 1000.0  # so that the small number under the root does not matter
        with torch.no_grad():
            zero = self.norm(torch.zeros(d, device=device, dtype=dtype)).double()
            plain = self.norm((size * signs).to(device, dtype)).double()
            moved = self.norm((size * (signs + 1)).to(device, dtype)).double()
            shifted = self.norm(size * torch.roll(signs, 1).to(device, dtype)).double()
        signs = signs.to(device)
        root = signs.pow(2).mean().sqrt()
        self.bias = zero
        # Every coordinate but the last one of an odd width is ±1 in one of the two vectors at least.
        other = torch.roll(signs, 1)
        self.gain = torch.where(signs != 0, (plain - zero) * signs, (shifted - zero) * other) * root
        self.centres = bool(torch.allclose(plain, moved, atol=1e-3, rtol=1e-3))

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(self, x: Tensor) -> Tensor:
        """(…) s(x) of streams (…, d_model).

        Raises:
            ValueError: the norm is not linear at a fixed scale.
        """
        with torch.no_grad():
            expected = self.norm(x).double() - self.bias
        straight = self._centred(x.double()) * self.gain
        scale = straight.pow(2).sum(-1) / (straight * expected).sum(-1)
        error = (straight / scale[..., None] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        if not float(error) < (1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2):
            raise UserError(
                f"the final norm ({type(self.norm).__name__}) is not gain · x / scale + bias (off by "
                f"{float(error):.2g} of the largest number): contributions to logits cannot be told apart"
            )
        return scale

    def part(self, x: Tensor, scale: Tensor) -> Tensor:
        """What a part (…, d_model) of the stream contributes to the normed stream at a scale (…), without the bias."""
        return self._centred(x.double()) * self.gain / scale[..., None]


@dataclass(frozen=True)
class Writing:
    """Contributions to the logits of one token (or of one less another) after the last token of each text.

    Attributes:
        heads: (item, block, head) float64.
        mlps: (item, block).
        rest: (item,) embedding, output biases, biases of norm and unembedding.
        total: (item,) the logit (difference); the sum of all of these.
        alone: (item, block, head) probability of the first token by the head alone; None if not asked for.
    """

    heads: Tensor
    mlps: Tensor
    rest: Tensor
    total: Tensor
    alone: Tensor | None

    def shares(self) -> Tensor:
        """(block, head) mean contribution over items divided by the mean of the whole logit (difference)."""
        return self.heads.mean(0) / self.total.mean()


def answer_direction(model: LanguageModel, target: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Directions (item, d_model) in the normed stream that a logit (difference) reads, and its constant (item,).

    Args:
        model: the model.
        target: (item,) token ids.
        other: (item,) whose logits are taken off; None: the mean over the vocabulary is.
    """
    weight: Any = model.unembedding.weight
    offset: Any = getattr(model.unembedding, "bias", None)

    def less_the_other(numbers: Tensor) -> Tensor:
        goal = numbers[target.to(numbers.device)].double()
        mean = numbers.mean(0, dtype=torch.float64)
        return goal - (mean if other is None else numbers[other.to(numbers.device)].double())

    direction = less_the_other(weight.detach())
    constant = direction.new_zeros(len(direction)) if offset is None else less_the_other(offset.detach())
    return direction, constant


def alone(model: LanguageModel, x: Tensor, tokens: Tensor) -> Tensor:
    """Probability of tokens (…) when (…, d_model) is all there is: final norm at its own scale, unembedding."""
    with torch.no_grad():
        logits = model.logits(model.final_norm(x))
        return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].exp()


@torch.no_grad()
def writing(
    heads: Heads,
    batch: EncodedBatch,
    target: Tensor,
    other: Tensor | None = None,
    with_alone: bool = True,
    batch_size: int = 8,
) -> Writing:
    """Contributions of every part to the logit of a token after the last one.

    Args:
        heads: of the model.
        batch: the texts.
        target: (item,) token ids.
        other: (item,) whose logits are taken off; None: the mean over the vocabulary is, because only differences
            between logits mean anything.
        with_alone: also the probability by every head alone (a whole softmax for each).
        batch_size: texts at once; changes nothing.

    Raises:
        ValueError: a model whose blocks add something else than heads, biases and MLPs (a norm behind the attention),
            or a final norm that is not linear at a fixed scale.
    """
    model = heads.model
    norm = FrozenNorm(model)
    parts: list[list[Tensor]] = []
    for start in range(0, len(batch), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(batch)))
        part = batch.select(rows.to(batch.input_ids.device)).to(model.device)
        goal = target[rows].to(model.device)
        seen = heads.run(part, z=True, mlp=True, residual=True)
        assert seen.z is not None and seen.mlp is not None and seen.residual is not None
        x = seen.residual[:, -1, -1]
        scale = norm.scale(x)
        direction, constant = answer_direction(model, goal, None if other is None else other[rows])
        written = torch.stack(
            [heads.written(block, seen.z[:, -1, block - 1].double()) for block in range(1, heads.n_blocks + 1)], dim=1
        )
        bias = sum((heads.output_bias(block).double() for block in range(1, heads.n_blocks + 1)), torch.tensor(0.0))
        base = seen.residual[:, -1, 0].double() + bias
        _check_sum(heads, written.sum((1, 2)) + seen.mlp[:, -1].double().sum(1) + base, x)

        def logit(y: Tensor, scale: Tensor = scale, direction: Tensor = direction) -> Tensor:
            shape = (len(y), *[1] * (y.dim() - 2))
            return (norm.part(y, scale.view(shape)) * direction.view(*shape, -1)).sum(-1)

        said = (
            alone(model, written.to(model.dtype), goal[:, None, None].expand(written.shape[:3])) if with_alone else None
        )
        parts.append(
            [
                logit(written),
                logit(seen.mlp[:, -1]),
                logit(base) + (norm.bias * direction).sum(-1) + constant,
                logit(x) + (norm.bias * direction).sum(-1) + constant,
                *([] if said is None else [said.double()]),
            ]
        )
    joined = [torch.cat([part[i] for part in parts]).cpu() for i in range(len(parts[0]))]
    return Writing(joined[0], joined[1], joined[2], joined[3], joined[4] if with_alone else None)


def _check_sum(heads: Heads, parts: Tensor, x: Tensor) -> None:
    error = float((parts - x.double()).abs().max() / x.double().abs().max().clamp(min=1e-12))
    allowed = 1e-3 if x.dtype == torch.float32 else 1e-8 if x.dtype == torch.float64 else 0.1
    if not error <= allowed:
        raise UserError(
            f"the blocks of {heads.model.name} add something else than heads, biases and MLPs (the sum of these is off "
            f"by {error:.2g} of the largest number): what a head contributes to a logit cannot be told"
        )


def ablated_probability(
    heads: Heads,
    batch: EncodedBatch,
    chosen: Tensor,
    means: ReferenceMeans,
    target: Tensor,
    batch_size: int = 8,
) -> Tensor:
    """(item,) probability of the target with the chosen heads (block, head) silenced: what writers are checked by,
    against random sets of the same size (`circuits.knockout.random_sets`)."""
    logits = knocked_out(heads, batch, ~chosen.bool(), means, batch_size=batch_size)
    return logits.double().log_softmax(-1)[torch.arange(len(logits)), target.cpu()].exp()
