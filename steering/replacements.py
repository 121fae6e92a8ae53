"""Interventions that put given values where a rollout computed its own: rows, means, prompts; and what hides slots.

Beside interventions.py, where a coefficient times a direction is added. All of them leave no trace: the model and the
run or prefill that a rollout started from are as before.

Knows nothing about where the values come from or what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from codi.branches import BranchAnswers, decode_branches
from codi.edits import Branches, EditTable
from codi.interventions import Intervention
from codi.parts import Parts
from codi.rollout import LatentRollout
from lm.terms import Timing

__all__ = [
    "AblatePrompt",
    "HideSlots",
    "MeanAblation",
    "Place",
    "RecordPrompt",
    "ReplaceRows",
    "replace_embeddings",
]

Place = tuple[str, int, int]


class ReplaceRows(Intervention):
    """Replaces what a rollout computes by given values, row by row.

    Args:
        values: place -> (active (row,) bool, value (row, …)). Places: ("embedding", k, 0) is z_k; ("hidden", k, 0) is
            h_{k-1} before it becomes z_k; ("layer", k, l) the residual stream at latent k after layer l; ("keys", k, l)
            and ("values", k, l) the cache slot of latent k in layer l = 1..n_layers. Inactive rows stay as they are.
    """

    row_by_row = True

    def __init__(self, values: Mapping[Place, tuple[Tensor, Tensor]]) -> None:
        self._values = dict(values)

    def _at(self, place: Place, x: Tensor) -> Tensor:
        if place not in self._values:
            return x
        active, value = self._values[place]
        active = active.to(x.device).view(-1, *[1] * (x.dim() - 1))
        return torch.where(active, value.to(x.device, x.dtype), x)

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self._at(("embedding", k, 0), z)

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        return self._at(("hidden", k, 0), h)

    def edit_layer(self, k: int, layer: int, x: Tensor) -> Tensor:
        return self._at(("layer", k, layer), x)

    def edit_kv(self, k: int, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(("keys", k, layer), keys), self._at(("values", k, layer), values)


class MeanAblation(Intervention):
    """Feeds the mean embedding of a latent instead of the prompt's own: what the latent knew about the prompt is gone.

    Args:
        latent: 1-based.
        mean: (d_model,) mean of z at that latent, over other prompts.
    """

    def __init__(self, latent: int, mean: Tensor) -> None:
        self.latent, self.latents, self.mean = latent, (latent,), mean

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self.mean.to(z).expand_as(z) if k == self.latent else z


class HideSlots(Intervention):
    """Hides one column of the past from one reader, row by row.

    Args:
        columns: (row,) index into the key positions; -1: nothing is hidden; -2: the whole prompt; -3: the question
            without its first token and without the protocol's tokens behind it, on which attention often rests when it
            reads nothing.
        readers: (row,) the latent 1..n that must not look, or n + 1: the answer; 0: everybody later.
        prompt_width: columns of the padded prompt.
        question: (row, 2) first and last column + 1 of the question without its first token; needed for -3.
    """

    row_by_row = True

    def __init__(self, columns: Tensor, readers: Tensor, prompt_width: int, question: Tensor | None = None) -> None:
        self._columns, self._readers, self._width, self._question = columns, readers, prompt_width, question

    def edit_mask(self, k: int, mask: Tensor) -> Tensor:
        places = torch.arange(mask.shape[1], device=mask.device)
        columns, readers = self._columns.to(mask.device)[:, None], self._readers.to(mask.device)[:, None]
        hidden = (places == columns) | ((columns == -2) & (places < self._width))
        if self._question is not None:
            first, last = self._question.to(mask.device)[:, :1], self._question.to(mask.device)[:, 1:]
            hidden |= (columns == -3) & (places >= first) & (places < last)
        reads = (readers == k) | ((readers == 0) & (columns < self._width + k - 1))
        return mask & ~(hidden & reads)


class RecordPrompt(Intervention):
    """Keeps the residual stream of the prompt, layer by layer, as the blocks hand it on."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}

    def edit_prompt_layer(self, layer: int, x: Tensor) -> Tensor:
        self.layers[layer] = x
        return x


class AblatePrompt(Intervention):
    """Replaces the residual stream of whole prompts by given means, aligned at the last token.

    Args:
        means: per row (layer 0..n_layers, position, d_model), positions as many as the prompt has tokens.
        embeddings: also replace layer 0; the published ablation does not, and leaks.
    """

    row_by_row = True

    def __init__(self, means: Sequence[Tensor], embeddings: bool = True) -> None:
        self._means, self._first = list(means), 0 if embeddings else 1

    def edit_prompt_layer(self, layer: int, x: Tensor) -> Tensor:
        if layer < self._first:
            return x
        x = x.clone()
        for row, mean in enumerate(self._means):
            x[row, x.shape[1] - mean.shape[1] :] = mean[layer].to(x)
        return x


def replace_embeddings(
    model: Parts,
    run: LatentRollout,
    vectors: Tensor,
    prompt: Tensor,
    latent: Tensor,
    direction: Tensor,
    coefficient: Tensor | float = 1.0,
    *,
    timing: Timing = "continue",
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
) -> BranchAnswers:
    """Answers with z_k of some latents replaced by coefficient · vector, through the branch engine.

    A row whose every replacement is what its prompt has there anyway is the unedited answer.

    Args:
        model: the model.
        run: unedited rollout with embeddings and cache.
        vectors: (direction, d_model).
        prompt: (row,) row of the run.
        latent: (row,) or (row, edit) latents to replace.
        direction: like latent: which vector, -1: leave it alone.
        coefficient: like latent, or one for all.
        timing, max_new_tokens, batch_size: of the decoding.
    """
    assert run.embeddings is not None, "the run must have kept its embeddings"
    coefficients = torch.as_tensor(coefficient, dtype=torch.float32).expand(latent.shape)
    flat = (latent.view(len(prompt), -1), direction.view(len(prompt), -1), coefficients.reshape(len(prompt), -1))
    table = vectors.to(run.embeddings.device, torch.float32)
    moved = torch.zeros(len(prompt), dtype=torch.bool)
    for latents, directions, scales in zip(*(x.unbind(1) for x in flat), strict=True):
        for start in range(0, len(prompt), 4096):
            rows = slice(start, start + 4096)
            wanted = (scales[rows, None].to(table) * table[directions[rows].clamp(min=0)]).to(run.embeddings.dtype)
            own = run.embeddings[prompt[rows], latents[rows] - 1]
            moved[rows] |= ((wanted != own).any(1).cpu()) & (directions[rows] >= 0)
    chosen = torch.where(moved.view(-1, *[1] * (direction.dim() - 1)), direction, torch.full_like(direction, -1))
    return decode_branches(
        model,
        run,
        EditTable("embedding", vectors=table),
        Branches(prompt, latent, chosen, torch.zeros(latent.shape), coefficients, replace=chosen >= 0),
        timing=timing,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
