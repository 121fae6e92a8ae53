"""What a sweep tries: every cell (pair, coefficient, latent), its baseline and its controls, as edits and directions.

A cell has two names, (A, B, c) and (B, A, −c); it is computed once, under A < B. Baselines are computed once per
prompt, and once per exit where the thought ends early. Draws of a control are one vector each, used at every latent
and coefficient size: A−B does not depend on where it is added, so neither do the draws it is compared with.

Knows the options and the means; nothing about prompts, answers or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

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
    "GridOptions",
    "Name",
    "conditions",
    "directions",
    "names",
    "parse_choices",
    "parse_coefficients",
    "parse_numbers",
    "parse_pairs",
    "unique_cells",
    "unique_pairs",
]

Word = TypeVar("Word", bound=str)
_PATCHES = {"patch-scalar": patch_scalar, "patch-coordinate": patch_coordinate, "patch-norm": patch_norm}

Cell = tuple[int, int, float]
"""A pair and a signed coefficient: (A, B, c), A < B."""


# --- Options as a person writes them ----------------------------------------------------------------------------------


def _items(words: Sequence[str]) -> list[str]:
    return [item for word in words for item in word.split(",") if item.strip()]


def parse_choices(name: str, words: Sequence[str], allowed: Sequence[Word]) -> tuple[Word, ...]:
    """Words separated by blanks or commas, each one of `allowed`, repeats dropped; "none" alone gives ()."""
    given = tuple(dict.fromkeys(item.strip() for item in _items(words)))
    if given == ("none",) and "none" not in allowed:
        return ()
    known = {str(word): word for word in allowed}
    for item in given:
        if item not in known:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, got {item!r}")
    if not given:
        raise ValueError(f"{name} must name at least one of {', '.join(allowed)}")
    return tuple(known[item] for item in given)


def parse_numbers(name: str, words: Sequence[str], highest: int) -> tuple[int, ...]:
    """Whole numbers 1..highest such as "1..6", "1,3,5" or "2 4", sorted, repeats dropped; "all" is every one."""
    numbers: set[int] = set()
    for item in _items(words):
        first, dots, last = item.strip().partition("..")
        try:
            bounds = (1, highest) if item.strip() == "all" else (int(first), int(last) if dots else int(first))
        except ValueError:
            message = f"{name} must be numbers in 1..{highest} such as 1..{highest} or 1,2, got {item!r}"
            raise ValueError(message) from None
        for bound in bounds:
            if not 1 <= bound <= highest:
                raise ValueError(f"{name} must be in 1..{highest}, got {bound}")
        numbers.update(range(bounds[0], bounds[1] + 1))
    if not numbers:
        raise ValueError(f"{name} must name at least one number in 1..{highest}, got {' '.join(words) or 'nothing'}")
    return tuple(sorted(numbers))


def parse_coefficients(words: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers separated by blanks or commas, sorted, repeats dropped; 0, the baseline, is dropped too."""
    found = set()
    for item in _items(words):
        try:
            number = float(item)
        except ValueError:
            raise ValueError(f"coefficients must be numbers such as -1,0.5,2, got {item.strip()!r}") from None
        if not abs(number) < float("inf"):
            raise ValueError(f"coefficients must be finite, got {item.strip()!r}")
        if number:
            found.add(number)
    if not found:
        raise ValueError("coefficients must hold a number other than 0 (0 is the baseline, which is always computed)")
    return tuple(sorted(found))


def parse_pairs(words: Sequence[str], n_latents: int) -> tuple[tuple[int, int], ...]:
    """Ordered pairs such as "2-5,5-1"; "all" is every one of the n (n − 1)."""
    pairs: dict[tuple[int, int], None] = {}
    for item in _items(words):
        text = item.strip()
        if text == "all":
            pairs.update({(a, b): None for a in range(1, n_latents + 1) for b in range(1, n_latents + 1) if a != b})
            continue
        first, dash, last = text.partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            raise ValueError(f"pairs must look like 2-5 (A-B, latents 1..{n_latents}) or be 'all', got {text!r}")
        a, b = int(first), int(last)
        if not (1 <= a <= n_latents and 1 <= b <= n_latents):
            raise ValueError(f"latents of a pair must be in 1..{n_latents}, got {text!r}")
        if a == b:
            raise ValueError(f"the two latents of a pair must differ, got {text!r}")
        pairs[a, b] = None
    if not pairs:
        raise ValueError("pairs must name at least one pair such as 2-5, or 'all'")
    return tuple(sorted(pairs))


def unique_pairs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The unordered pairs, as A < B, sorted."""
    return sorted({(min(pair), max(pair)) for pair in pairs})


def unique_cells(pairs: Sequence[tuple[int, int]], coefficients: Sequence[float]) -> tuple[Cell, ...]:
    """The distinct edits among pairs × coefficients, under their name with A < B, sorted."""
    cells = {(a, b, c) if a < b else (b, a, -c) for a, b in pairs for c in coefficients}
    return tuple(sorted(cells))


# --- Options, checked -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridOptions:
    """What is tried, in numbers; impossible values are refused.

    Attributes:
        spaces, parts, timings: which edits; parts apply to kv space.
        pairs: ordered pairs of latents. latents: edited positions. coefficients: signed, not 0.
        controls: subset of CONTROLS. draws: of each control. draw_norm: "pair" or "pooled" (see `directions`).
        keys: "content" or "raw". layers, kv_heads: 1-based, None: all; kv space only.
        key_scale, value_scale: factors on the coefficient of keys and of values.
        n_latents: of a whole thought. seed: of all draws. legacy: the seed study's scripts.
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
    legacy: bool = False

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
        if self.legacy:
            if self.timings != ("early-exit",):
                raise ValueError(f"legacy steering is early-exit, got timing {', '.join(self.timings)}")
            if "hidden" in self.spaces:
                raise ValueError("legacy steering exists in kv and embedding space, got hidden")
            if self.layers is not None or self.kv_heads is not None:
                raise ValueError("legacy steering edits all layers and kv-heads")
            if self.keys != "raw":
                raise ValueError(f"legacy steering uses raw keys, got {self.keys}")

    def parts_of(self, space: Space) -> tuple[Part, ...]:
        """Parts tried in a space: a vector writes both keys and values."""
        return self.parts if space == "kv" else ("both",)

    def controls_of(self, space: Space) -> tuple[str, ...]:
        """Controls that exist in a space: patching replaces a vector, and no legacy script does it."""
        return tuple(c for c in self.controls if c in PAIR_CONTROLS or (space != "kv" and not self.legacy))


# --- Directions -------------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """Which direction: source and target are 0 for pooled draws and patches, latent is 0 except for patches, draw is
    -1 for the mean difference itself."""

    control: str
    source: int
    target: int
    latent: int
    draw: int


def names(options: GridOptions, space: Space) -> list[Name]:
    """The directions that a sweep of one space needs, in the order of its edit table."""
    pairs = unique_pairs(options.pairs)
    found = [Name("direction", a, b, 0, -1) for a, b in pairs]
    owners = pairs if options.draw_norm == "pair" else [(0, 0)]
    for control in options.controls_of(space):
        if control in PAIR_CONTROLS:
            found += [Name(control, a, b, 0, draw) for a, b in owners for draw in range(options.draws)]
        else:
            found += [Name(control, 0, 0, latent, draw) for latent in options.latents for draw in range(options.draws)]
    return found


def directions(
    options: GridOptions, space: Space, means: LatentMeans, draws: ControlDraws | None = None
) -> list[Direction]:
    """The directions named by `names`, in that order.

    A draw is matched in norm, block by block, to its pair's direction (`draw_norm` "pair": draws of its own for every
    unordered pair) or to the mean over the swept pairs ("pooled": the same draws for all pairs, an order cheaper).

    Args:
        options: what is tried.
        space: which of its spaces.
        means: over the derivation prompts.
        draws: raw draws, needed by the controls "covariance" and "shuffled".
    """
    wanted = names(options, space)
    swept: dict[tuple[int, int], Direction] = {}
    for name in wanted:
        if name.control == "direction":
            a, b = name.source, name.target
            if options.legacy:
                swept[a, b] = legacy_difference(means, a, b, space)
            elif space == "kv":
                swept[a, b] = difference(
                    means, a, b, space, keys=options.keys, layers=options.layers, kv_heads=options.kv_heads
                )
            else:
                swept[a, b] = difference(means, a, b, space)
    pairs = list(swept)
    likes = {**swept, (0, 0): typical(list(swept.values()))}

    def one(name: Name) -> Direction:
        like = likes[name.source, name.target]
        if name.control == "direction":
            return like
        if name.control in PATCH_CONTROLS:
            rng = generator(options.seed, name.control, space, name.latent, name.draw)
            return _PATCHES[name.control](means, name.latent, space, rng)
        if name.control == "random":
            return random_direction(like, generator(options.seed, "random", space, name.source, name.target, name.draw))
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


def conditions(options: GridOptions, space: Space, part: Part, timing: Timing) -> list[Condition]:
    """Everything that is tried on every prompt in one space, part and timing, ordered by edited latent.

    Args:
        options: what is tried.
        space, part, timing: as named.

    Returns:
        Baselines (control "none": one per exit in early-exit, with latent = the exit; else one, with latent 0),
        directions (source < target), controls (coefficient = |c|, or 0 for patches). Edits point to the rows of
        `names`.
    """
    coefficients: dict[tuple[int, int], list[float]] = {pair: [] for pair in unique_pairs(options.pairs)}
    for a, b, c in unique_cells(options.pairs, options.coefficients):
        coefficients[a, b].append(c)
    sizes = sorted({abs(c) for c in options.coefficients})
    table = names(options, space)
    extra = 1 if options.legacy and space == "embedding" else 0  # the scripts' extra latent, which is the edited one
    found: list[Condition] = []
    for latent in options.latents:
        n = latent + extra if timing == "early-exit" else options.n_latents
        base = Edit(latent + extra, part=part, key_scale=options.key_scale, value_scale=options.value_scale)
        if timing == "early-exit":
            found.append(Condition("none", 0, 0, 0.0, -1, latent, n, base))
        elif latent == options.latents[0]:
            found.append(Condition("none", 0, 0, 0.0, -1, 0, n, base))
        for row, (control, a, b, where, draw) in enumerate(table):
            if control in PATCH_CONTROLS:
                if where == latent:
                    edit = replace(base, direction=row, coefficient=1.0, replace=True, own_norm=control == "patch-norm")
                    found.append(Condition(control, 0, 0, 0.0, draw, latent, n, edit))
                continue
            for c in coefficients[a, b] if control == "direction" else sizes:
                found.append(Condition(control, a, b, c, draw, latent, n, replace(base, direction=row, coefficient=c)))
    return found
