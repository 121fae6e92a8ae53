"""What is kept of the states of pairs of texts while they come batch by batch, and the control vectors made of it.

With x+ and x- the states of a pair at one layer, and d = x+ - x-:

method         direction
reading        mean of x+
contrastive    mean of d
pca-contrast   first principal component of d
pca-reading    first principal component of x+

Every pair weighs the same. Reading and contrastive vectors are not normalised. A principal component has no sign of its
own: it gets the one for which the positive text of most pairs lies further along it than the negative one. Published
vectors are centred (the mean is taken away first, so what all pairs share is lost) and their signs are arbitrary.

Source: Højer, Jarvis, Heinrich 2025, arXiv 2504.19483.

Knows nothing about models or texts: states come from the caller, such as `steering.contrasts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from lm.errors import UserError
from lm.terms import VECTOR_METHODS, VectorMethod, VectorScale
from steering.control_vectors import ControlVector, VectorOrigin
from steering.directions import generator

__all__ = ["PairStatistics"]

VOTERS = 512
"""Pairs whose votes fix the sign once there are too many to keep: a uniform sample of them."""


class _Moments:
    """Mean and second moment of rows (row, layer, d_model), in float64 on the CPU.

    Rows are kept while there are no more of them than `keep`; from then on d_model² sums per layer and a uniform sample
    of the rows, so memory does not grow.
    """

    def __init__(self, keep: int, seed: int) -> None:
        self.count = 0
        self._keep, self._seed = keep, seed
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None
        self._kept: list[Tensor] = []
        self._keys: list[float] = []

    def add(self, rows: Tensor, indices: Sequence[int]) -> None:
        self.count += len(rows)
        self._sum = rows.sum(0) if self._sum is None else self._sum + rows.sum(0)
        if self._gram is not None:
            self._gram += torch.einsum("nld,nle->lde", rows, rows)
        self._kept.append(rows)
        self._keys += [generator(self._seed, "voter", index).random() for index in indices]
        if self._gram is None and self.count > self._keep:
            all_rows = self.kept
            self._gram = torch.einsum("nld,nle->lde", all_rows, all_rows)
        if self._gram is not None and len(self._keys) > VOTERS:
            chosen = np.argsort(self._keys, kind="stable")[:VOTERS].tolist()
            self._kept, self._keys = [self.kept[chosen]], [self._keys[i] for i in chosen]

    @property
    def kept(self) -> Tensor:
        """(row, layer, d_model) all rows, or a sample of them."""
        return torch.cat(self._kept)

    @property
    def mean(self) -> Tensor:
        """(layer, d_model)."""
        assert self._sum is not None
        return self._sum / self.count

    def principal(self, layer: int, centred: bool) -> tuple[Tensor, float]:
        """Unit vector (d_model,) of the first principal component at an index of the layer axis, and its share of the
        variance; ValueError where there is none."""
        offset = self.mean[layer] if centred else torch.zeros_like(self.mean[layer])
        if self._gram is None:
            rows = self.kept[:, layer]
            raw = float(rows.square().sum())
            rows = rows - offset
            wide = len(rows) < rows.shape[1]
            matrix = rows @ rows.T if wide else rows.T @ rows
        else:
            rows, wide = torch.empty(0), False
            raw = float(self._gram[layer].trace())
            matrix = self._gram[layer] - self.count * torch.outer(offset, offset)
        total = float(matrix.trace())
        if total <= 1e-20 * raw or total <= 0:
            raise UserError("a principal component needs two or more pairs that differ, and these do not")
        last = len(matrix) - 1
        values, vectors = eigh(matrix.numpy(), subset_by_index=[last, last])
        direction = torch.from_numpy(np.ascontiguousarray(vectors[:, 0]))
        direction = rows.T @ direction if wide else direction
        return direction / direction.norm(), float(values[0]) / total


class PairStatistics:
    """Adds states of pairs batch by batch; `vector` and `shuffled` can be asked for at any time.

    Attributes:
        layers: that the rows are of, in their order.

    Args:
        origin: of the vectors: the model, which tokens, of what texts (`n`, `method` and what follows are set here).
        layers: as the attribute.
        draws: shuffled vectors to collect.
        seed: of these.
        keep: pairs that are kept as they are; None: as many as the model is wide, where sums begin to be smaller.
    """

    def __init__(
        self, origin: VectorOrigin, layers: Sequence[int], draws: int = 0, seed: int = 0, keep: int | None = None
    ) -> None:
        if draws < 0:
            raise UserError(f"draws must be 0 or more, got {draws}")
        self._origin, self.layers, self._draws, self._seed, self._keep = origin, tuple(layers), draws, seed, keep
        self._positive: _Moments | None = None
        self._difference: _Moments | None = None
        self._swapped: Tensor | None = None  # sum of differences with signs, (draw, layer, d_model)
        self._tosses: Tensor | None = None  # sum of the signs, (draw,)

    @property
    def n(self) -> int:
        """Pairs added."""
        return 0 if self._positive is None else self._positive.count

    def update(self, positive: Tensor, negative: Tensor | None, indices: Sequence[int]) -> None:
        """Add pairs.

        Args:
            positive, negative: (pair, layer, d_model) states; negative None: readings only, then in every update.
            indices: number of every pair, on which its shuffling depends (not on batches).

        Raises:
            ValueError: shapes that do not fit each other or the layers, or negatives only sometimes.
        """
        x = positive.detach().double().cpu()
        if x.dim() != 3 or x.shape[1] != len(self.layers) or len(x) != len(indices) or not len(x):
            wanted = f"({len(indices)}, {len(self.layers)}, d_model)"
            raise UserError(f"states must be {wanted}, one or more pairs, got {tuple(x.shape)}")
        if self._positive is not None and (negative is None) != (self._difference is None):
            raise UserError("either every pair has a negative text or none has")
        keep = x.shape[2] if self._keep is None else self._keep
        if self._positive is None:
            self._positive = _Moments(keep, self._seed)
        self._positive.add(x, indices)
        if negative is None:
            return
        d = x - negative.detach().double().cpu()
        if self._difference is None:
            self._difference = _Moments(keep, self._seed)
        self._difference.add(d, indices)
        if self._draws:
            signs = torch.from_numpy(np.stack([self._swaps(index) for index in indices]))
            swapped, tosses = torch.einsum("nk,nld->kld", signs, d), signs.sum(0)
            self._swapped = swapped if self._swapped is None else self._swapped + swapped
            self._tosses = tosses if self._tosses is None else self._tosses + tosses

    def _swaps(self, index: int) -> np.ndarray:
        """(draw,) -1 where the texts of a pair are swapped: of pairs 2k and 2k + 1 always one, drawn."""
        coin = generator(self._seed, "swap", index // 2).choice([-1.0, 1.0], self._draws)
        return coin if index % 2 == 0 else -coin

    def vector(self, method: VectorMethod, *, centred: bool = True, scale: VectorScale = "mean") -> ControlVector:
        """The control vector of a method, see this module.

        Args:
            method: "reading", "contrastive", "pca-contrast" or "pca-reading".
            centred: PCA after the mean was taken away (published), or of the states as they are.
            scale: of principal components, "mean": as long as the mean (of d, of x+) is, so that coefficients mean
                about the same as for the other methods; "unit": 1.

        Raises:
            ValueError: an unknown name, nothing added, a contrast without negative texts, or a principal component of
                pairs that do not differ.
        """
        if method not in VECTOR_METHODS:
            raise UserError(f"method must be one of {', '.join(VECTOR_METHODS)}, got {method!r}")
        if scale not in get_args(VectorScale):
            raise UserError(f"scale must be one of {', '.join(get_args(VectorScale))}, got {scale!r}")
        contrast = method in ("contrastive", "pca-contrast")
        moments = self._moments(contrast, f"the method {method}")
        origin = replace(self._origin, method=method, n=moments.count)
        mean = moments.mean
        if not method.startswith("pca"):
            return ControlVector({layer: mean[i] for i, layer in enumerate(self.layers)}, origin)
        directions, explained = {}, {}
        for i, layer in enumerate(self.layers):
            direction, share = moments.principal(i, centred)
            direction = direction * self._sign(direction, i)
            directions[layer] = direction * (float(mean[i].norm()) if scale == "mean" else 1.0)
            explained[layer] = share
        return ControlVector(directions, replace(origin, centred=centred, scale=scale, explained=explained))

    def shuffled(self, draw: int, like: ControlVector) -> ControlVector:
        """The mean difference after the texts of one half of the pairs were swapped, with the norms of `like`: what the
        same states give where nobody knows which text is the positive one.

        Exactly half, drawn at random (of an odd number the mean is taken away): after independent tosses a share of the
        contrast itself would be left, which scaled up to full length can be most of the vector.

        Args:
            draw: 0-based.
            like: vector to match, layer by layer.

        Raises:
            ValueError: a draw that was not collected, or no negative texts.
        """
        count = self._moments(True, "a shuffled vector").count
        if not 0 <= draw < self._draws:
            raise UserError(f"{self._draws} shuffled vectors were collected, numbered from 0, got {draw}")
        assert self._swapped is not None and self._tosses is not None and self._difference is not None
        mean = (self._swapped[draw] - self._tosses[draw] * self._difference.mean) / count
        origin = replace(self._origin, method="shuffled", n=count)
        found = ControlVector({layer: mean[i] for i, layer in enumerate(self.layers)}, origin)
        return found.only(like.layers).scaled(like)

    def _moments(self, contrast: bool, what: str) -> _Moments:
        if self._positive is None:
            raise UserError("a control vector needs at least one pair, none was added")
        if not contrast:
            return self._positive
        if self._difference is None:
            raise UserError(f"{what} needs negative texts, none were given")
        return self._difference

    def _sign(self, direction: Tensor, layer: int) -> float:
        """1 or -1: the majority of pairs (of texts, where there are no negatives); in a tie the mean decides."""
        moments = self._difference or self._positive
        assert moments is not None
        along = moments.kept[:, layer] @ direction
        votes = int((along > 0).sum() - (along < 0).sum())
        return -1.0 if votes < 0 or (votes == 0 and float(moments.mean[layer] @ direction) < 0) else 1.0
