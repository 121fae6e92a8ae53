"""Trials of a grid of edits, paired with their baseline: one row per edit, sums of answers per cluster of prompts.

What it does: `families` pairs every trial with the unsteered answer of the same prompt and sums by cluster; every table
of cells starts from that. `mirror` gives each edit under both of its names.

What it does not know: how an effect is tested, figures, files.

Definitions, used by all tables
    cell        one edit: (space, part, timing, source A, target B, coefficient c, latent). (A, B, c) and (B, A, -c) are
                the same edit; a *unique* cell has A < B, the other one is its mirror and carries the same numbers.
    family      all unique cells of one (space, part, timing): every pair, latent and signed coefficient. Corrections
                for multiple testing are made over one family.
    difference  accuracy of the edited run minus accuracy of the unsteered run on the same prompts (and with the same
                number of latents: in early-exit, the unsteered exit after that latent). A fraction, -1..1.
    cluster     prompts that share a number triple. Intervals and p-values treat clusters, not prompts, as independent.
    unparsed    an answer without a number. It counts as wrong and is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings
from lm.terms import TRIAL_CONTROLS

__all__ = ["FAMILY", "TRIAL_COLUMNS", "Family", "as_families", "families", "mirror", "named"]

#: columns of the trial table that the statistics read (the table has more: text, prediction, ...)
TRIAL_COLUMNS = (
    "space", "part", "timing", "source", "target", "coefficient", "control", "draw", "latent", "n_latents",
    "prompt_id", "cluster", "correct", "parsed", "applied_norm",
)  # fmt: skip
FAMILY = ("space", "part", "timing")

_CHUNK = 1024  # conditions whose answers are held at once


@dataclass(frozen=True)
class Family:
    """All conditions of one (space, part, timing), paired with the unsteered run and summed per cluster.

    `conditions` has one row per edit, control draws included (columns control, source, target, coefficient, draw,
    latent, n_latents, n, n_clusters, accuracy, baseline, difference, gained, lost, unparsed, applied_norm); rows of
    direction cells are unique (source < target). Sums are (condition, cluster), in the order of its rows; answers of
    single prompts are 1 (right), 0 (wrong) or -1 (not there), prompts in the order of their clusters.
    """

    space: str
    part: str
    timing: str
    conditions: pd.DataFrame
    differences: np.ndarray  # sums of edited - unsteered correctness, integers
    correct: np.ndarray  # sums of edited correctness
    counts: np.ndarray  # prompts
    prompts_key: np.ndarray  # (condition,) which set of prompts it saw: equal keys, equal sets
    clusters: np.ndarray  # names, sorted
    answers: np.ndarray  # (condition, prompt) int8
    baselines: np.ndarray  # (baseline, prompt) int8, unsteered answers
    parsed: np.ndarray  # (baseline, prompt) int8, whether they hold a number
    baseline_of: np.ndarray  # (condition,) row of `baselines`
    prompt_cluster: np.ndarray  # (prompt,) number of its cluster

    @property
    def name(self) -> dict[str, str]:
        """The columns FAMILY of its rows."""
        return {"space": self.space, "part": self.part, "timing": self.timing}

    @property
    def baseline_correct(self) -> np.ndarray:
        """(condition, cluster) sums of unsteered correctness."""
        return self.correct - self.differences

    def of(self, *controls: str) -> np.ndarray:
        """Row numbers of the conditions with one of these controls."""
        return np.flatnonzero(self.conditions["control"].isin(controls).to_numpy())

    def draws_of(self, rows: np.ndarray, control: str) -> list[np.ndarray]:
        """For each of some direction cells, the rows of its control draws: same pair (or draws pooled over pairs),
        latent, |c| and the same prompts."""
        columns = ["source", "target", "latent", "n_latents"]
        draws, table = self.of(control), self.conditions
        groups: dict[tuple, list[int]] = {}
        keys = zip(*(table[column].to_numpy()[draws] for column in columns), strict=True)
        for row, key, size in zip(draws, keys, table["coefficient"].to_numpy()[draws], strict=True):
            groups.setdefault((*key, round(float(size), 9)), []).append(row)
        found = []
        keys = zip(*(table[column].to_numpy()[rows] for column in columns), strict=True)
        for row, key, size in zip(rows, keys, table["coefficient"].to_numpy()[rows], strict=True):
            size = round(abs(float(size)), 9)
            shared = (0, 0, *key[2:], size)  # pooled draws belong to no pair: they serve those without own ones
            members = np.array(groups.get((*key, size)) or groups.get(shared, []), int)
            found.append(members[self.prompts_key[members] == self.prompts_key[row]])
        return found

    def weights(self, settings: Settings) -> np.ndarray:
        """(resample, cluster) weights, the same for every cell of the family."""
        return settings.weights(len(self.clusters))


def mirror(table: pd.DataFrame) -> pd.DataFrame:
    """Trials or cells with every edit under both of its names, (A, B, c) and (B, A, -c).

    Rows that are no directions (baseline, controls) are kept as they are; a mirror that the table already has is not
    added again. The result is sorted like its input, mirrors behind.
    """
    directions = table["control"].eq("direction") if "control" in table else pd.Series(True, index=table.index)
    copies = table[directions].copy()
    copies[["source", "target"]] = copies[["target", "source"]].to_numpy()
    copies["coefficient"] = -copies["coefficient"]
    keys = [*FAMILY, "source", "target", "coefficient", "latent", "n_latents", "control", "draw", "prompt_id"]
    keys = [key for key in keys if key in table]
    both = pd.concat([table, copies], ignore_index=True)
    repeated = both.duplicated(keys, keep="first").to_numpy(copy=True)
    repeated[: len(table)] = False
    return both[~repeated].reset_index(drop=True)


def families(trials: pd.DataFrame) -> list[Family]:
    """Pairs every trial with the unsteered answer of its prompt and sums by cluster, per space, part and timing.

    The unsteered answer is the row with control "none" of the same prompt, timing and number of latents; of several
    (early-exit) the one of the same latent. Baseline rows of another space or part serve where a family has none, since
    the unsteered run does not depend on them.

    Raises:
        ValueError: a missing column, an unknown control, a repeated trial, a trial without its unsteered answer.
    """
    missing = [column for column in TRIAL_COLUMNS if column not in trials]
    if missing:
        raise ValueError(f"the trial table lacks the columns {', '.join(missing)}")
    if trials.empty:
        raise ValueError("the trial table is empty")
    table = trials.loc[:, list(TRIAL_COLUMNS)]
    named = [column for column in TRIAL_COLUMNS if column != "applied_norm"]
    holes = [column for column in named if table[column].isna().any()]
    if holes:
        raise ValueError(f"the trial table has missing values in {', '.join(holes)}")
    for column in (*FAMILY, "control", "prompt_id", "cluster"):
        table[column] = pd.Categorical(table[column])
    unknown = [control for control in table["control"].cat.categories if control not in TRIAL_CONTROLS]
    if unknown:
        raise ValueError(f"unknown control {unknown[0]!r}; allowed: {', '.join(TRIAL_CONTROLS)}")
    unsteered = (table["control"] == "none").to_numpy()
    edited = table[~unsteered]
    baselines = table[unsteered]
    if baselines.empty:
        raise ValueError("the trial table has no baseline (control 'none'): nothing to pair with")
    result = []
    for (space, part, timing), rows in edited.groupby(list(FAMILY), observed=True, sort=True):
        own = baselines[baselines["timing"] == timing]
        for column, value in (("space", space), ("part", part)):
            same = own[own[column] == value]
            own = same if len(same) else own
        if own.empty:
            raise ValueError(f"no baseline rows with timing {timing!r} for {space} {part}")
        result.append(_pair(str(space), str(part), str(timing), rows, own))
    return result


def _pair(space: str, part: str, timing: str, rows: pd.DataFrame, baselines: pd.DataFrame) -> Family:
    where = f"{space} {part} {timing}"
    prompt_ids, starts, cluster_names = _prompts(baselines)
    places = np.full(len(rows["prompt_id"].cat.categories), -1)  # category code -> place of the prompt
    places[pd.Index(rows["prompt_id"].cat.categories).get_indexer(prompt_ids)] = np.arange(len(prompt_ids))

    keys = baselines.groupby(["n_latents", "latent"], sort=True)
    base_keys = keys.size().index.to_frame(index=False)
    base_prompts = places[baselines["prompt_id"].cat.codes]
    base = _dense(keys.ngroup().to_numpy(), base_prompts, baselines["correct"], len(base_keys), len(prompt_ids))
    if base is None:
        raise ValueError(f"{where}: the baseline of a prompt is there more than once")
    parsed = _dense(keys.ngroup().to_numpy(), base_prompts, baselines["parsed"], len(base_keys), len(prompt_ids))
    assert parsed is not None

    rows, index, conditions = _unique_edits(rows, where)
    prompts = places[rows["prompt_id"].cat.codes]
    if (prompts < 0).any():
        example = rows["prompt_id"].to_numpy()[np.argmax(prompts < 0)]
        raise ValueError(f"{where}: prompt {example!r} has trials but no baseline")
    correct = _dense(index, prompts, rows["correct"], len(conditions), len(prompt_ids))
    if correct is None:
        raise ValueError(f"{where}: a prompt appears twice in one condition")
    baseline_of = _matching_baseline(conditions, base_keys, where)
    before = base[baseline_of]
    lacking = (correct >= 0) & (before < 0)
    if lacking.any():
        cell, prompt = np.argwhere(lacking)[0]
        latent = conditions["latent"].iloc[cell]
        raise ValueError(f"{where}: prompt {prompt_ids[prompt]!r} has no baseline at latent {latent}")
    (differences, right, counts), flips, prompts_key = _sums(correct, before, starts)
    _describe(conditions, (differences, right, counts), flips, rows, index)
    sizes = np.diff(np.r_[starts, len(prompt_ids)])
    return Family(
        space, part, timing, conditions, differences, right, counts, prompts_key, cluster_names, correct, base, parsed,
        baseline_of, np.repeat(np.arange(len(starts)), sizes),
    )  # fmt: skip


def _prompts(baselines: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts in the order of their clusters, so that a cluster is a slice; where each slice starts; its name."""
    pairs = baselines[["cluster", "prompt_id"]].drop_duplicates()
    pairs = pairs.astype(object).sort_values(["cluster", "prompt_id"], key=lambda column: column.astype(str))
    if pairs["prompt_id"].duplicated().any():
        example = pairs.loc[pairs["prompt_id"].duplicated(), "prompt_id"].iloc[0]
        raise ValueError(f"prompt {example!r} belongs to several clusters")
    codes, names = pd.factorize(pairs["cluster"].to_numpy())
    return pairs["prompt_id"].to_numpy(), np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]), np.asarray(names)


def _unique_edits(rows: pd.DataFrame, where: str) -> tuple[pd.DataFrame, np.ndarray, pd.DataFrame]:
    """One name for each edit (source < target): the rows that count, the condition of each, and the conditions."""
    rows = rows.copy()
    direction = (rows["control"] == "direction").to_numpy()
    swapped = direction & (rows["source"] > rows["target"]).to_numpy()
    source, target = rows["source"].to_numpy(), rows["target"].to_numpy()
    if (direction & (source == target)).any():
        raise ValueError(f"{where}: a direction has the same latent as source and target")
    rows["source"], rows["target"] = np.where(swapped, target, source), np.where(swapped, source, target)
    coefficient = rows["coefficient"].to_numpy(float)
    rows["coefficient"] = np.where(direction, np.where(swapped, -coefficient, coefficient), np.abs(coefficient)) + 0.0
    columns = ["control", "source", "target", "coefficient", "draw", "latent", "n_latents"]
    index, conditions = _groups(rows, columns)
    twice = np.bincount(index[swapped], minlength=len(conditions)).astype(bool)
    twice &= np.bincount(index[~swapped], minlength=len(conditions)).astype(bool)
    keep = ~(swapped & twice[index])  # where a sweep computed both names of an edit, the unique one counts
    return rows[keep], index[keep], conditions


def _sums(correct: np.ndarray, base: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums per cluster of (condition, prompt) answers: (3, condition, cluster) of difference, right and seen; flips
    (2, condition) up and down; and a key of the set of prompts of each condition."""
    number = len(correct)
    sums = np.zeros((3, number, len(starts)), np.int32)
    flips = np.zeros((2, number), np.int64)
    salt = np.random.default_rng(0).integers(0, 2**63, correct.shape[1], dtype=np.uint64)
    prompts_key = np.zeros(number, np.uint64)
    for start in range(0, number, _CHUNK):
        part = slice(start, start + _CHUNK)
        seen = correct[part] >= 0
        now, before = np.where(seen, correct[part], 0), np.where(seen, base[part], 0)
        for out, values in zip(sums, (now - before, now, seen), strict=True):
            out[part] = np.add.reduceat(values, starts, axis=1, dtype=np.int32)
        flips[0, part] = (now > before).sum(1)
        flips[1, part] = (now < before).sum(1)
        prompts_key[part] = (seen * salt).sum(1, dtype=np.uint64)
    return sums, flips, prompts_key


def _describe(
    conditions: pd.DataFrame,
    sums: tuple[np.ndarray, np.ndarray, np.ndarray],
    flips: np.ndarray,
    rows: pd.DataFrame,
    index: np.ndarray,
) -> None:
    """Adds the numbers of every condition to its row."""
    differences, right, counts = sums
    n, number = counts.sum(1), len(conditions)
    conditions["n"], conditions["n_clusters"] = n, (counts > 0).sum(1)
    conditions["accuracy"] = right.sum(1) / n
    conditions["baseline"] = (right - differences).sum(1) / n
    conditions["difference"] = differences.sum(1) / n
    conditions["gained"], conditions["lost"] = flips
    unparsed = ~rows["parsed"].to_numpy(bool)
    conditions["unparsed"] = np.bincount(index, weights=unparsed, minlength=number).astype(np.int64)
    norms = rows["applied_norm"].to_numpy(float)
    known = ~np.isnan(norms)
    total = np.bincount(index[known], weights=norms[known], minlength=number)
    conditions["applied_norm"] = total / np.maximum(np.bincount(index[known], minlength=number), 1)


def _groups(rows: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Number of each row's group and the groups' keys, sorted; an integer code per column is faster than groupby."""
    codes = np.zeros(len(rows), np.int64)
    levels = []
    for column in columns:
        values = rows[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            code, level = values.cat.codes.to_numpy(np.int64), values.cat.categories.to_numpy(object)
        else:
            code, found = pd.factorize(values.to_numpy(), sort=True)
            level = np.asarray(found)
        codes = codes * len(level) + code
        levels.append(level)
    index, names = pd.factorize(codes, sort=True)
    names = np.asarray(names)
    keys: dict[str, np.ndarray] = {}
    for column, level in zip(columns[::-1], levels[::-1], strict=True):
        keys[column] = level[names % len(level)]
        names = names // len(level)
    return index, pd.DataFrame({column: keys[column] for column in columns})


def _dense(rows: np.ndarray, columns: np.ndarray, correct: pd.Series, n_rows: int, n_columns: int) -> np.ndarray | None:
    """(condition, prompt) int8: 1 right, 0 wrong, -1 not there; None if a place would be filled twice."""
    out = np.full((n_rows, n_columns), -1, np.int8)
    out[rows, columns] = correct.to_numpy(bool)
    return out if np.count_nonzero(out >= 0) == len(rows) else None


def _matching_baseline(conditions: pd.DataFrame, base_keys: pd.DataFrame, where: str) -> np.ndarray:
    known = {(int(n), int(latent)): row for row, (n, latent) in enumerate(base_keys.itertuples(index=False))}
    found = {}
    for n, latent in set(zip(conditions["n_latents"], conditions["latent"], strict=True)):
        for candidate in (latent, 0, -1, n):  # -1, 0: a baseline that belongs to no latent in particular
            if (int(n), int(candidate)) in known:
                found[n, latent] = known[int(n), int(candidate)]
                break
        else:
            raise ValueError(f"{where}: no baseline with {n} latents for the cells at latent {latent}")
    return np.array([found[key] for key in zip(conditions["n_latents"], conditions["latent"], strict=True)], int)


def as_families(trials: pd.DataFrame | Sequence[Family]) -> Sequence[Family]:
    """The families of a trial table, or the families that are given."""
    return families(trials) if isinstance(trials, pd.DataFrame) else trials


def named(paired: Sequence[Family], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of all families in one, with the columns that name the family first."""
    kept = [
        pd.concat([pd.DataFrame([family.name] * len(table)), table], axis=1)
        for family, table in zip(paired, tables, strict=True)
        if len(table)
    ]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
