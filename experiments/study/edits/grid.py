"""What is tried: every cell (pair, coefficient, latent), its baseline and its controls, as edits and directions.

A cell has two names, (A, B, c) and (B, A, −c); it is computed once, under A < B. Baselines are computed once per
prompt, and once per exit where the thought ends early. Draws of a control are one vector each, used at every latent
and coefficient size: A−B does not depend on where it is added, so neither do the draws it is compared with.

Knows plain values and the means; nothing about options, prompts, answers or files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lm.terms import (
    CONTROLS,
    PAIR_CONTROLS,
    PARTS,
    PATCH_CONTROLS,
    SPACES,
    TIMINGS,
    DrawNorm,
    KeyFrame,
    Part,
    Space,
    Timing,
)
from steering.directions import (
    Direction,
    covariance_matched,
    difference,
    generator,
    legacy_difference,
    patch_coordinate,
    patch_norm,
    patch_scalar,
    random_direction,
    shuffled_difference,
    typical,
)
from steering.interventions import Edit
from steering.means import ControlDraws, LatentMeans

__all__ = [
    "Cell",
    "Condition",
    "Formula",
    "Grid",
    "Name",
    "conditions",
    "directions",
    "names",
    "unique_cells",
    "unique_pairs",
]

_PATCHES = {"patch-scalar": patch_scalar, "patch-coordinate": patch_coordinate, "patch-norm": patch_norm}

Formula = Literal["corrected", "published"]
"""Direction of the label A-B: mean_A − mean_B of what is edited, or what the published scripts add under that label
(steering.directions.legacy_difference)."""
Cell = tuple[int, int, float]
"""A pair and a signed coefficient: (A, B, c), A < B."""


def unique_pairs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The unordered pairs, as A < B, sorted."""
    return sorted({(min(pair), max(pair)) for pair in pairs})


def unique_cells(pairs: Sequence[tuple[int, int]], coefficients: Sequence[float]) -> tuple[Cell, ...]:
    """The distinct edits among pairs × coefficients, under their name with A < B, sorted."""
    cells = {(a, b, c) if a < b else (b, a, -c) for a, b in pairs for c in coefficients}
    return tuple(sorted(cells))


# --- The grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What is tried, in numbers; impossible values are refused.

    Attributes:
        spaces, parts, timings: which edits; parts apply to kv space.
        pairs: ordered pairs of latents. latents: edited positions. coefficients: signed, not 0.
        controls: subset of CONTROLS. draws: of each control. draw_norm: "pair" or "pooled" (see `directions`).
        keys: "content" or "raw". layers, kv_heads: 1-based, None: all; kv space only.
        key_scale, value_scale: factors on the coefficient of keys and of values.
        n_latents: of a whole thought. seed: of all draws.
        formula: what the label of a pair stands for. No patches with "published": no script has them.
        extra_latents: in embedding space, latents after the named one; the last of them is edited (published: 1).
    """

    spaces: tuple[Space, ...] = ("kv", "embedding")
    parts: tuple[Part, ...] = ("both",)
    timings: tuple[Timing, ...] = ("early-exit",)
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
    latents: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    coefficients: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    controls: tuple[str, ...] = ("random",)
    draws: int = 20
    draw_norm: DrawNorm = "pair"
    keys: KeyFrame = "content"
    layers: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    n_latents: int = 6
    seed: int = 0
    formula: Formula = "corrected"
    extra_latents: int = 0

    def __post_init__(self) -> None:
        for name, values, allowed in (
            ("space", self.spaces, SPACES),
            ("part", self.parts, PARTS),
            ("timing", self.timings, TIMINGS),
            ("controls", self.controls, CONTROLS),
        ):
            for value in values:
                if value not in allowed:
                    raise ValueError(f"{name} must be among {', '.join(allowed)}, got {value!r}")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}; --controls none leaves the controls out")
        if self.draw_norm not in ("pair", "pooled"):
            raise ValueError(f"draw-norm must be pair or pooled, got {self.draw_norm!r}")
        if "kv" not in self.spaces and (self.layers is not None or self.kv_heads is not None):
            raise ValueError(f"layers and kv-heads can be chosen in kv space only, got space {', '.join(self.spaces)}")
        if self.key_scale == 0 and "keys" in self.parts or self.value_scale == 0 and "values" in self.parts:
            raise ValueError("a scale of 0 leaves nothing of the part that it scales")
        if self.key_scale == 0 and self.value_scale == 0:
            raise ValueError("key-scale and value-scale must not both be 0")

    def parts_of(self, space: Space) -> tuple[Part, ...]:
        """Parts tried in a space: a vector writes both keys and values."""
        return self.parts if space == "kv" else ("both",)

    def controls_of(self, space: Space) -> tuple[str, ...]:
        """Controls that exist in a space: patching replaces a vector."""
        patches = space != "kv" and self.formula == "corrected"
        return tuple(c for c in self.controls if patches or c in PAIR_CONTROLS)

    def extra(self, space: Space) -> int:
        """Latents between the named latent and the edited one."""
        return self.extra_latents if space == "embedding" else 0

    def longest(self, space: Space, timing: Timing) -> int:
        """Latents of the longest thought that a space and timing need."""
        return max(self.latents) + self.extra(space) if timing == "early-exit" else self.n_latents


# --- Directions -------------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """Which direction: source and target are 0 for pooled draws and patches, latent is 0 except for patches, draw is
    -1 for the mean difference itself."""

    control: str
    source: int
    target: int
    latent: int
    draw: int


def names(grid: Grid, space: Space) -> list[Name]:
    """The directions that a sweep of one space needs, in the order of its edit table."""
    pairs = unique_pairs(grid.pairs)
    found = [Name("direction", a, b, 0, -1) for a, b in pairs]
    owners = pairs if grid.draw_norm == "pair" else [(0, 0)]
    for control in grid.controls_of(space):
        if control in PAIR_CONTROLS:
            found += [Name(control, a, b, 0, draw) for a, b in owners for draw in range(grid.draws)]
        else:
            found += [Name(control, 0, 0, latent, draw) for latent in grid.latents for draw in range(grid.draws)]
    return found


def _of_pair(grid: Grid, space: Space, means: LatentMeans, name: Name) -> Direction:
    a, b = name.source, name.target
    if grid.formula == "published":
        return legacy_difference(means, a, b, space)
    if space == "kv":
        return difference(means, a, b, space, keys=grid.keys, layers=grid.layers, kv_heads=grid.kv_heads)
    return difference(means, a, b, space)


def directions(grid: Grid, space: Space, means: LatentMeans, draws: ControlDraws | None = None) -> list[Direction]:
    """The directions named by `names`, in that order.

    A draw is matched in norm, block by block, to its pair's direction (`draw_norm` "pair": draws of its own for every
    unordered pair) or to the mean over the swept pairs ("pooled": the same draws for all pairs, an order cheaper).

    Args:
        grid: what is tried.
        space: which of its spaces.
        means: over the derivation prompts.
        draws: raw draws, needed by the controls "covariance" and "shuffled".
    """
    wanted = names(grid, space)
    swept = {(name.source, name.target): _of_pair(grid, space, means, name) for name in wanted if name.draw < 0}
    pairs = list(swept)
    likes = {**swept, (0, 0): typical(list(swept.values()))}

    def one(name: Name) -> Direction:
        like = likes[name.source, name.target]
        if name.control == "direction":
            return like
        if name.control in PATCH_CONTROLS:
            rng = generator(grid.seed, name.control, space, name.latent, name.draw)
            return _PATCHES[name.control](means, name.latent, space, rng)
        if name.control == "random":
            return random_direction(like, generator(grid.seed, "random", space, name.source, name.target, name.draw))
        if draws is None:
            raise ValueError(f"control {name.control!r} needs the draws that were collected with the means")
        if name.control == "covariance":
            return covariance_matched(draws, name.draw, like)
        a, b = (name.source, name.target) if name.source else pairs[name.draw % len(pairs)]  # pooled: pairs take turns
        return shuffled_difference(draws, name.draw, a, b, like)

    return [one(name) for name in wanted]


# --- Conditions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One row of the trial table but for the prompt, and the edit that makes it."""

    control: str
    source: int
    target: int
    coefficient: float
    draw: int
    latent: int
    n_latents: int
    edit: Edit


@functools.lru_cache(maxsize=32)
def conditions(grid: Grid, space: Space, part: Part, timing: Timing) -> tuple[Condition, ...]:
    """Everything that is tried on every prompt in one space, part and timing, ordered by edited latent.

    Args:
        grid: what is tried.
        space, part, timing: as named.

    Returns:
        Baselines (control "none": one per exit in early-exit, with latent = the exit; else one, with latent 0),
        directions (source < target), controls (coefficient = |c|, or 0 for patches). Edits point to the rows of
        `names`.
    """
    coefficients: dict[tuple[int, int], list[float]] = {pair: [] for pair in unique_pairs(grid.pairs)}
    for a, b, c in unique_cells(grid.pairs, grid.coefficients):
        coefficients[a, b].append(c)
    sizes = sorted({abs(c) for c in grid.coefficients})
    table = names(grid, space)
    extra = grid.extra(space)
    found: list[Condition] = []
    for latent in grid.latents:
        n = latent + extra if timing == "early-exit" else grid.n_latents
        base = Edit(latent + extra, part=part, key_scale=grid.key_scale, value_scale=grid.value_scale)
        if timing == "early-exit":
            found.append(Condition("none", 0, 0, 0.0, -1, latent, n, base))
        elif latent == grid.latents[0]:
            found.append(Condition("none", 0, 0, 0.0, -1, 0, n, base))
        for row, (control, a, b, where, draw) in enumerate(table):
            if control in PATCH_CONTROLS:
                if where == latent:
                    edit = replace(base, direction=row, coefficient=1.0, replace=True, own_norm=control == "patch-norm")
                    found.append(Condition(control, 0, 0, 0.0, draw, latent, n, edit))
                continue
            for c in coefficients[a, b] if control == "direction" else sizes:
                found.append(Condition(control, a, b, c, draw, latent, n, replace(base, direction=row, coefficient=c)))
    return tuple(found)
