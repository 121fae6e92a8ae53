"""The answers behind one cell of a sweep: every prompt with its unsteered and its steered answer, flips first.

(A, B, c) and (B, A, −c) are the same edit, so either name finds it. The unsteered answer is that of the same timing and
number of latents. Only the rows of the cell are read from the folder. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

__all__ = ["CHANGES", "Cell", "cells_of", "listing", "there"]

CHANGES = ("gained", "lost", "changed", "same")
"""What an edit did to an answer: wrong to right, right to wrong, another text but no flip, nothing."""
_NAMES = ("space", "part", "timing")


@dataclass(frozen=True)
class Cell:
    """One edit of a sweep, in one space, part and timing.

    Attributes:
        space, part, timing: where and when.
        answers: one row per prompt, flips first: prompt_id, answer (the right one), unsteered, steered, was_right,
            is_right, change (of `CHANGES`).
    """

    space: str
    part: str
    timing: str
    answers: pd.DataFrame

    def count(self, change: str) -> int:
        """Prompts with this change."""
        return int((self.answers["change"] == change).sum())


def _dataset(run: Path) -> ds.Dataset:
    paths = sorted((run / "trials").glob("part-*.parquet"))
    if not paths:
        raise ValueError(f"{run} has no trials yet: run its command to the end")
    try:
        return ds.dataset([str(path) for path in paths], format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{run}: the trials cannot be read ({error})") from None


def _text(column: str) -> ds.Expression:
    return ds.field(column).cast(pa.string())


def _tried(run: Path) -> pd.DataFrame:
    """Every edit of a run: one row per space, part, timing, control, pair, coefficient, latent and draw."""
    columns = [*_NAMES, "control", "source", "target", "coefficient", "latent", "draw"]
    tables = []
    for fragment in _dataset(run).get_fragments():  # in parts: few distinct rows each
        tables.append(fragment.to_table(columns=columns).to_pandas().drop_duplicates())
    table = pd.concat(tables, ignore_index=True)
    return table.astype({name: str for name in (*_NAMES, "control")}).drop_duplicates()


def there(run: Path) -> dict[str, list[Any]]:
    """What a run tried: space, part, timing, pair (as A-B, A < B), latent, |coefficient| and draw, each sorted."""
    return _parts_of(_tried(run))


def _parts_of(table: pd.DataFrame) -> dict[str, list[Any]]:
    edits, draws = table[table["control"] == "direction"], table[table["control"] == "random"]
    found: dict[str, list[Any]] = {name: sorted(edits[name].unique()) for name in _NAMES}
    pairs = sorted({(int(a), int(b)) for a, b in zip(edits["source"], edits["target"], strict=True)})
    found["pair"] = [f"{a}-{b}" for a, b in pairs]
    found["latent"] = sorted(map(int, edits["latent"].unique()))
    found["coefficient"] = sorted({abs(float(c)) for c in edits["coefficient"]})
    found["draw"] = sorted(map(int, draws["draw"].unique()))
    return found


def cells_of(
    run: Path, pair: tuple[int, int], latent: int, coefficient: float, draw: int | None = None,
    only: Mapping[str, str | None] = {},
) -> list[Cell]:  # fmt: skip
    """The cells of a run with this pair, latent and coefficient, one per space, part and timing.

    Args:
        run: folder of a sweep.
        pair: A and B.
        latent: that was edited.
        coefficient: signed.
        draw: a random direction in place of the pair's own.
        only: space, part or timing -> the one that is wanted; None: any.

    Raises:
        ValueError: no such cell; what is there is listed. Or no trials.
    """
    data = _dataset(run)
    (a, b), c = pair, coefficient
    if a > b:
        a, b, c = b, a, -c
    wanted = ds.field("latent") == latent
    for name, value in only.items():
        if value is not None:
            wanted &= _text(name) == value
    columns = [*_NAMES, "control", "source", "coefficient", "n_latents", "prompt_id", "answer", "text", "correct"]
    if draw is None:
        wanted &= (_text("control") == "direction") & (ds.field("source") == a) & (ds.field("target") == b)
    else:  # draws of the pair, or those that all pairs share
        own = (ds.field("source") == a) & (ds.field("target") == b)
        wanted &= (_text("control") == "random") & (ds.field("draw") == draw) & (own | (ds.field("source") == 0))
        c = abs(c)
    edited = data.to_table(columns=columns, filter=wanted).to_pandas()
    edited = edited[np.isclose(edited["coefficient"], c)]
    if edited.empty:
        raise ValueError(_unknown(run, pair, latent, coefficient, draw, only))
    plain = data.to_table(columns=[*columns, "latent"], filter=_text("control") == "none").to_pandas()
    plain = plain[plain["latent"].isin((0, latent))]
    return [_cell(dict(zip(_NAMES, names, strict=True)), rows, plain) for names, rows in _groups(edited)]


def _groups(edited: pd.DataFrame) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    for name in _NAMES:
        edited[name] = edited[name].astype(str)
    for names, rows in edited.groupby(list(_NAMES), sort=True):
        yield tuple(map(str, names)), rows  # type: ignore[arg-type]


def _cell(names: Mapping[str, str], rows: pd.DataFrame, plain: pd.DataFrame) -> Cell:
    """Rows of one cell beside the unsteered answers; another space or part lends them where it has none of its own."""
    mine = plain[plain["timing"].astype(str) == names["timing"]]
    mine = mine[mine["n_latents"].isin(rows["n_latents"].unique())]
    mine = mine.drop_duplicates("prompt_id").astype({"prompt_id": str}).set_index("prompt_id")
    found = pd.DataFrame({
        "prompt_id": rows["prompt_id"].astype(str).to_numpy(),
        "answer": rows["answer"].to_numpy(),
        "steered": rows["text"].astype(str).to_numpy(),
        "is_right": rows["correct"].to_numpy(bool),
    })  # fmt: skip
    known = found["prompt_id"].isin(mine.index)
    if not known.all():
        lacking = found["prompt_id"][~known].iloc[0]
        raise ValueError(f"prompt {lacking!r} has no unsteered answer: the run is not finished, give its command again")
    found["unsteered"] = mine.loc[found["prompt_id"], "text"].astype(str).to_numpy()
    found["was_right"] = mine.loc[found["prompt_id"], "correct"].to_numpy(bool)
    gained, lost = ~found["was_right"] & found["is_right"], found["was_right"] & ~found["is_right"]
    other = found["steered"] != found["unsteered"]
    found["change"] = np.select([gained, lost, other], CHANGES[:3], CHANGES[3])
    place = found["change"].map({name: i for i, name in enumerate(CHANGES)})
    found = found.iloc[np.lexsort((found["prompt_id"], place))].reset_index(drop=True)
    return Cell(**names, answers=found)


def _unknown(
    run: Path, pair: tuple[int, int], latent: int, coefficient: float, draw: int | None, only: Mapping[str, str | None]
) -> str:
    """Which part of the name of a cell the run does not have, and what it has."""
    tried = _tried(run)
    known = _parts_of(tried)
    asked: dict[str, Any] = {
        **{name: value for name, value in only.items() if value is not None},
        "pair": f"{min(pair)}-{max(pair)}", "latent": latent, "coefficient": abs(coefficient),
    }  # fmt: skip
    if draw is not None:
        asked["draw"] = draw
    odd = [name for name, value in asked.items() if value not in known[name]]
    if not odd:  # each of them was run, but not together
        a, b = min(pair), max(pair)
        here = tried[(tried["source"] == a) & (tried["target"] == b) & (tried["control"] == "direction")]
        sign = 1 if pair == (a, b) else -1
        signed = ", ".join(f"{c:+g}" for c in sorted(sign * here["coefficient"].unique()))
        latents = listing("latent", sorted(map(int, here["latent"].unique())))
        return (
            f"{run} holds no such cell: pair {pair[0]}-{pair[1]} was run with coefficients {signed}, "
            f"at latents {latents}, got {coefficient:+g} and {latent}"
        )
    told = "; ".join(f"{name} {listing(name, known[name])}" for name in odd)
    what = ", ".join(f"{name} {asked[name]:g}" if name == "coefficient" else f"{name} {asked[name]}" for name in odd)
    return f"{run} holds no such cell: no {what}; there are: {told}"


def listing(name: str, values: list[Any]) -> str:
    """The values of one part of a cell's name, in words."""
    if not values:
        return "none"
    if name == "coefficient":
        return ", ".join(f"±{value:g}" for value in values)
    if name == "pair":
        return ", ".join(values) + " (or the other way round)"
    numbers = all(isinstance(value, int) for value in values)
    if numbers and len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values))
