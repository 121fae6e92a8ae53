"""What studies that are not yet data share (see run.py): old names of options, folder and rows; and, until their rooms
are there, row-wise interventions, forced answers, paired tables and figures.

Its trial tables have one row per prompt, `condition` and `draw`. New studies use options.py, parts.py, run.py,
answers.py, thoughts.py, experiments/statistics and experiments/figures.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from codi import Intervention, LatentRollout, Prefill
from codi.branches import BranchAnswers, Branches, EditTable, Timing, decode_branches
from codi.cache import clone_cache
from codi.decode import decode_answers
from codi.rollout import feed, overrides
from experiments.study import answers, options
from experiments.study.claims import ClaimsTable, effect_claim
from experiments.study.folder import RunFolder, open_run
from experiments.study.thoughts import Bank, Thoughts, think
from experiments.sweep.cells import (
    Settings,
    bootstrap_interval,
    cluster_weights,
    max_statistic_p,
    mcnemar_p,
    sign_flip_p,
)
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lm.terms import Attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from codi import CodiModel

__all__ = [
    "PALETTE",
    "Bank",
    "ReplaceRows",
    "Result",
    "StudyFolder",
    "StudyOptions",
    "Thoughts",
    "answer_rows",
    "answer_table",
    "compare",
    "divergence",
    "draw_matrix",
    "draw_series",
    "effect_claim",
    "forced",
    "interval",
    "levels",
    "load_model",
    "load_prompts",
    "markdown",
    "new_figure",
    "open_study",
    "p_text",
    "replace_embeddings",
    "row_of",
    "rows_of",
    "stderr",
    "think",
]

FORMAT = 1


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyOptions(options.StudyOptions):
    """Options of the studies that are not yet data (see run.py)."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"draws": 1}

    @property
    def settings(self) -> Settings:
        """How the statistics are computed."""
        return Settings(
            resamples=self.resamples, permutations=self.permutations, level=self.level, seed=self.seed
        )


def load_model(config: StudyOptions, attention: Attention = "sdpa") -> CodiModel:
    """The model that the options name."""
    return config.load(attention)


def load_prompts(config: StudyOptions, suffix: str = "", known_steps: int = 0) -> Split:
    """Evaluation and derivation prompts."""
    return config.load_split(config.seed, suffix, known_steps)


# --- Run folder -------------------------------------------------------------------------------------------------------


class StudyFolder:
    """The open run folder of one study: parts that are computed once, tables, figures, summary.

    Args:
        folder: opened by `open_study`.
        say: called with lines for a person.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.parts: list[str] = []

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder.path

    def part(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A part of the trial table: read if this run has made it already, else computed and written.

        Args:
            name: of the part; the file is trials/part-{name}.parquet.
            compute: makes it.
        """
        self.parts.append(name)
        if not self.folder.has_part(name, None):
            began = time.time()
            frame = compute().reset_index(drop=True)
            self.folder.write_part(name, frame)
            self.say(f"  {name}: {len(frame):,} rows in {time.time() - began:.0f} s")
        return self.folder.read_parts([name])

    def table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Write a table as {name}.csv and give it back."""
        self.folder.write(f"{name}.csv", frame.to_csv(index=False).encode())
        return frame

    def draw(self, make: Callable[[], Mapping[str, Figure]]) -> None:
        """Make figures in the studies' style and write each as figures/{name}.png and .pdf."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        with pyplot.rc_context(STYLE):
            for name, figure in make().items():
                for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
                    buffer = io.BytesIO()
                    figure.savefig(
                        buffer, format=kind, dpi=200, bbox_inches="tight", pad_inches=0.05, metadata=metadata
                    )
                    self.folder.write(f"figures/{name}.{kind}", buffer.getvalue())
                pyplot.close(figure)

    def finish(self, title: str, paragraphs: Sequence[str], claims: ClaimsTable | None = None) -> str:
        """Write the claims and summary.md; the text is what a study prints."""
        text = "\n\n".join([f"# {title}", *paragraphs])
        if claims is not None:
            claims.write(self.folder.write)
            text += "\n\n## Published claims\n\n" + claims.markdown()
        figures = sorted(path.name for path in (self.path / "figures").glob("*.png"))
        text += f"\n\nTables and trials: {self.path}; figures (PNG and PDF): {', '.join(figures) or 'none'}."
        self.folder.write("summary.md", (text + "\n").encode())
        return text


@contextmanager
def open_study(
    name: str, config: StudyOptions, model: CodiModel, split: Split, say: Callable[[str], None] | None = None
) -> Iterator[StudyFolder]:
    """Begin or go on with the run folder of a study.

    Args:
        name: of the study.
        config: its options; where and how fast it runs is no part of the run's identity.
        model: the model.
        split: the prompts.
        say: called with lines for a person; None: they are dropped.

    Raises:
        ValueError: the folder holds a run with other options, or something else.
    """
    identity = {
        "study": name,
        "format": FORMAT,
        "options": options.identity_of(config),
        "split": split.record(),
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
    }
    say = say or (lambda line: None)
    about = f"{len(split.evaluation)} prompts in {len({p.cluster for p in split.evaluation})} clusters"
    with open_run(config.out, identity, model=config.model, about=about, say=say) as folder:
        yield StudyFolder(folder, say)


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        path: its run folder.
        tables: the tables it wrote, by name.
        claims: published claims, if any are in its scope.
        text: the summary that is printed.
    """

    path: Path
    tables: dict[str, pd.DataFrame]
    claims: ClaimsTable | None
    text: str


def stderr(line: str) -> None:
    """A line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- Rows -------------------------------------------------------------------------------------------------------------

Place = tuple[str, int, int]


class ReplaceRows(Intervention):
    """Replaces what a rollout computes by given values, row by row.

    Args:
        values: place -> (active (row,) bool, value (row, …)). Places: ("embedding", k, 0) is z_k; ("hidden", k, 0) is
            h_{k-1} before it becomes z_k; ("layer", k, l) the residual stream at latent k after layer l; ("keys", k, l)
            and ("values", k, l) the cache slot of latent k in layer l = 1..n_layers. Inactive rows stay as they are.
    """

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


Edits = Callable[[Tensor], Sequence[Intervention]]
"""Row numbers of one batch -> interventions that see exactly these rows."""


def answer_rows(
    model: CodiModel,
    prefill: Prefill,
    prompt: Sequence[int] | Tensor,
    edits: Edits,
    *,
    n_latents: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 256,
) -> list[str]:
    """Greedy answers of many edited rollouts that start from computed prompts.

    Args:
        model: the model.
        prefill: computed prompts; not changed.
        prompt: (row,) which prompt a row continues.
        edits: interventions for a batch of rows; rollout and answer both see them.
        n_latents: latents; None: as many as the model was trained with.
        max_new_tokens, batch_size: of the decoding.
    """
    rows = torch.as_tensor(prompt, dtype=torch.long)
    number = model.n_latents if n_latents is None else n_latents
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        here = torch.arange(start, min(start + batch_size, len(rows)))
        interventions = list(edits(here))
        run = model.rollout(prefill.select(rows[here]), number, interventions, keep=("cache",))
        texts += decode_answers(model, run, max_new_tokens, interventions=interventions).texts
    return texts


def replace_embeddings(
    model: CodiModel,
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


@torch.no_grad()
def forced(
    model: CodiModel,
    run: LatentRollout,
    tokens: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
    hidden_states: bool = False,
    attentions: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the model says at every position of given answers, after the run.

    Args:
        model: the model.
        run: rollout that kept its cache; not changed.
        tokens: per row an answer without its end of text (the unedited run's own answer, usually).
        interventions: of which `edit_mask` with k = n_latents + 1 applies.
        hidden_states, attentions: also return them, at the last end-of-thought token (attentions need eager attention).

    Returns:
        log-probabilities (row, position, vocab) float32 in nats for the answer's tokens and the end of text;
        (row, position) bool, True where an answer has that position;
        hidden states (row, layer, d_model) and attentions (row, layer, head, key position) at the end-of-thought token,
        or None.
    """
    assert run.past_key_values is not None, "the run must have kept its cache"
    size, device = len(run), run.states.device
    after = list(model.protocol.after_latents)
    longest = max(len(answer) for answer in tokens) + 1
    fed = torch.full((size, len(after) + longest - 1), model.protocol.eos_id, device=device)
    there = torch.zeros(size, longest, dtype=torch.bool, device=device)
    for row, answer in enumerate(tokens):
        fed[row, : len(after)] = torch.tensor(after, device=device)
        fed[row, len(after) : len(after) + len(answer)] = torch.tensor(list(answer), dtype=torch.long, device=device)
        there[row, : len(answer) + 1] = True
    mask = torch.cat((run.attention_mask, torch.ones_like(fed, dtype=torch.bool)), dim=1)
    seen: Tensor | None = mask
    masked = overrides(interventions, "edit_mask")
    if model.mask == "published":
        seen = torch.ones_like(mask) if masked else None
    if masked and seen is not None:
        for one in interventions:
            seen = one.edit_mask(run.n_latents + 1, seen)
    first = run.first_position + run.n_latents
    positions = first[:, None] + torch.arange(fed.shape[1], device=device)
    model.check_length(int(positions.max()) + 1)
    cache = clone_cache(run.past_key_values)
    step = feed(model, model.embed(fed), cache, seen, positions, hidden_states=hidden_states, attentions=attentions)
    at = len(after) - 1
    logp = model.logits(step.last[:, at:]).float().log_softmax(-1)
    layers = None if step.hidden_states is None else step.hidden_states[:, at]
    weights = None if step.attentions is None else step.attentions[:, at]
    return logp, there, layers, weights


def divergence(before: Tensor, after: Tensor, there: Tensor) -> Tensor:
    """KL(before || after) of the answer's distribution along the answer that was forced, in nats, 0 or more.

    Sum over the positions of the forced answer (its end of text included) of the KL divergence between the two
    next-token distributions. It is part of the full KL over all answers: the part along that answer.

    Args:
        before, after: (row, position, vocab) log-probabilities from `forced`.
        there: (row, position) which positions count.

    Returns:
        (row,) float64.
    """
    a, b = before.double(), after.double()
    each = (a.exp() * (a - b)).sum(-1).clamp_min(0)
    return torch.where(there, each, torch.zeros_like(each)).sum(1)


def answer_table(
    problems: Sequence[Problem], prompt: Sequence[int] | Tensor, texts: Sequence[str], **columns: Any
) -> pd.DataFrame:
    """`answers.answer_table` of a study whose conditions are words; `draw` is 0 if it is not given."""
    assert "condition" in columns, "every row of a trial table belongs to a condition"
    return answers.answer_table(problems, prompt, texts, **{"draw": 0, **columns})


# --- Statistics -------------------------------------------------------------------------------------------------------


def _prompt_means(trials: pd.DataFrame, outcome: str) -> tuple[pd.DataFrame, np.ndarray, int]:
    """(prompt × condition) mean over draws, cluster code of each prompt, number of clusters."""
    values = trials.assign(**{outcome: trials[outcome].astype(float)})
    table = values.groupby(["cluster", "prompt_id", "condition"], observed=True, sort=True)[outcome].mean().unstack()
    codes, names = pd.factorize(table.index.get_level_values("cluster"), sort=True)
    return table, codes, len(names)


def _cluster_sums(values: np.ndarray, codes: np.ndarray, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """(column, cluster) sums and counts of (prompt, column) values, NaN = not there."""
    member = np.zeros((n_clusters, len(codes)))
    member[codes, np.arange(len(codes))] = 1
    known = ~np.isnan(values)
    return (member @ np.where(known, values, 0.0)).T, (member @ known.astype(float)).T


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """The whole range of an outcome: of a fraction 0..1, of a difference of fractions -1..1, else what was seen."""
    low, high = float(np.nanmin(values, initial=0.0)), float(np.nanmax(values, initial=0.0))
    return min(low, 0.0), max(high, 1.0)


def levels(trials: pd.DataFrame, outcome: str = "correct", settings: Settings | None = None) -> pd.DataFrame:
    """Mean of an outcome in every condition, with its interval.

    Args:
        trials: with columns condition, prompt_id, cluster and the outcome (bool or number); draws of a prompt are
            averaged first.
        outcome: column.
        settings: resamples, level, seed.

    Returns:
        One row per condition: condition, n (prompts), n_clusters, mean, lower, upper (95 %, bootstrap over clusters).
    """
    settings = settings or Settings()
    table, codes, n_clusters = _prompt_means(trials, outcome)
    sums, counts = _cluster_sums(table.to_numpy(float), codes, n_clusters)
    weights = cluster_weights(n_clusters, settings.resamples, settings.seed)
    lower, upper = bootstrap_interval(
        sums, counts, weights=weights, level=settings.level, bounds=_bounds(table.to_numpy(float))
    )
    return pd.DataFrame(
        {
            "condition": table.columns.astype(str),
            "n": counts.sum(1).astype(int),
            "n_clusters": (counts > 0).sum(1),
            "mean": sums.sum(1) / np.maximum(counts.sum(1), 1),
            "lower": lower,
            "upper": upper,
        }
    )


def compare(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[str, str]],
    outcome: str = "correct",
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Paired differences between conditions, over the prompts that both have; all contrasts are one family.

    Args:
        trials: as in `levels`.
        contrasts: (condition, reference) pairs.
        outcome: column, bool or number.
        settings: resamples, permutations, level, seed.

    Returns:
        One row per contrast: condition, reference, n, n_clusters, mean, reference_mean, difference, lower, upper
        (bootstrap over clusters), gained and lost (prompts above and below the reference), mcnemar_p (prompts taken as
        independent; NaN if an outcome is no truth value or has several draws), p (sign flips of whole clusters: exact
        for truth values, else by `permutations` random flips), q (Benjamini-Hochberg over the contrasts), fwer_p
        (step-down max-statistic over them).

    Raises:
        ValueError: a condition that the trials do not have, or no prompt in common.
    """
    settings = settings or Settings()
    columns = ["condition", "reference", "n", "n_clusters", "mean", "reference_mean", "difference", "lower", "upper"]
    columns += ["gained", "lost", "mcnemar_p", "p", "q", "fwer_p"]
    if not contrasts:
        return pd.DataFrame({column: [] for column in columns})
    table, codes, n_clusters = _prompt_means(trials, outcome)
    for name in {name for pair in contrasts for name in pair}:
        if name not in table.columns:
            raise ValueError(f"the trials have no condition {name!r}")
    pairs = [(table[a].to_numpy(float), table[b].to_numpy(float)) for a, b in contrasts]
    both = [~np.isnan(a) & ~np.isnan(b) for a, b in pairs]
    for (a, b), known in zip(contrasts, both, strict=True):
        if not known.any():
            raise ValueError(f"conditions {a!r} and {b!r} have no prompt in common")
    values = np.stack([np.where(known, a - b, np.nan) for (a, b), known in zip(pairs, both, strict=True)], axis=1)
    sums, counts = _cluster_sums(values, codes, n_clusters)
    weights = cluster_weights(n_clusters, settings.resamples, settings.seed)
    largest = max(1.0, float(np.nanmax(np.abs(values))))
    lower, upper = bootstrap_interval(sums, counts, weights=weights, level=settings.level, bounds=(-largest, largest))
    gained, lost = (np.nan_to_num(values) > 1e-12).sum(0), (np.nan_to_num(values) < -1e-12).sum(0)
    whole = np.array([np.isin(np.abs(column[~np.isnan(column)]), (0.0, 1.0)).all() for column in values.T])
    p = np.ones(len(contrasts))
    for i, row in enumerate(sums):
        if whole[i]:
            p[i] = sign_flip_p(np.rint(row).astype(int)[None])[0]
        else:
            p[i] = max_statistic_p(row[None], permutations=settings.permutations, seed=settings.seed)[0]
    means = [(float(a[k].mean()), float(b[k].mean())) for (a, b), k in zip(pairs, both, strict=True)]
    return pd.DataFrame(
        {
            "condition": [a for a, _ in contrasts],
            "reference": [b for _, b in contrasts],
            "n": counts.sum(1).astype(int),
            "n_clusters": (counts > 0).sum(1),
            "mean": [a for a, _ in means],
            "reference_mean": [b for _, b in means],
            "difference": sums.sum(1) / counts.sum(1),
            "lower": lower,
            "upper": upper,
            "gained": gained,
            "lost": lost,
            "mcnemar_p": np.where(whole, mcnemar_p(gained, lost), np.nan),
            "p": p,
            "q": multipletests(p, method="fdr_bh")[1],
            "fwer_p": max_statistic_p(sums, permutations=settings.permutations, seed=settings.seed),
        }
    )[columns]


# --- Words ------------------------------------------------------------------------------------------------------------


def row_of(table: pd.DataFrame, condition: str, reference: str | None = None) -> dict[str, Any]:
    """The one row of a table with this condition (and reference)."""
    found = table[table["condition"] == condition]
    if reference is not None:
        found = found[found["reference"] == reference]
    assert len(found) == 1, f"{condition!r} against {reference!r}: {len(found)} rows"
    return {str(key): value for key, value in found.iloc[0].items()}


def rows_of(table: pd.DataFrame, conditions: Sequence[str], **chosen: Any) -> pd.DataFrame:
    """The rows with these conditions, in that order, where the other columns have the chosen values."""
    for column, value in chosen.items():
        table = table[table[column] == value]
    return pd.DataFrame([row_of(table, name) for name in conditions])


def interval(row: pd.Series | Mapping[str, Any], name: str = "mean", scale: float = 100, digits: int = 1) -> str:
    """An estimate as "12.3 [10.1, 14.9]", in per cent unless another scale is given."""
    sign = "+" if name == "difference" else ""
    numbers = [f"{scale * row[key]:{sign}.{digits}f}" for key in (name, "lower", "upper")]
    zero = {f"{value:{sign}.{digits}f}" for value in (0.0, -0.0)}
    numbers = [f"{0:.{digits}f}" if text in zero else text.replace("-", "−") for text in numbers]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def p_text(p: float) -> str:
    """A p-value for a sentence."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def markdown(table: pd.DataFrame, columns: Mapping[str, str], formats: Mapping[str, str] | None = None) -> str:
    """Some columns of a table as markdown.

    Args:
        table: rows.
        columns: column -> heading.
        formats: column -> format specification.
    """
    formats = formats or {}
    lines = [f"| {' | '.join(columns.values())} |", "|" + "---|" * len(columns)]
    for _, row in table.iterrows():
        cells = [format(row[name], formats[name]) if name in formats else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Figures ----------------------------------------------------------------------------------------------------------

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
"""Okabe and Ito: can be told apart with every common colour blindness."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAGE_WIDTH = 6.9
"""Inches: a figure over both columns of a paper."""


STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


def new_figure(rows: int = 1, columns: int = 1, height: float = 2.6, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of page width and `height` inches per row, with a grid of axes (always a 2-d array)."""
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(PAGE_WIDTH, height * rows), squeeze=False, layout="constrained", **options
    )


def draw_series(
    axis: Any,
    x: Sequence[float],
    table: pd.DataFrame,
    label: str,
    place: int,
    name: str = "mean",
    scale: float = 100,
    joined: int | None = None,
) -> None:
    """One series with intervals, shifted a little so that intervals do not hide each other; the first `joined` points
    (None: all) are joined by a line."""
    shift = 0.07 * (place % 7 - 2)
    values = scale * table[name].to_numpy(float)
    spread = np.abs(np.stack([values - scale * table["lower"], scale * table["upper"] - values]))
    axis.errorbar(
        np.asarray(x, float) + shift,
        values,
        yerr=spread,
        color=PALETTE[place % len(PALETTE)],
        marker=MARKERS[place % len(MARKERS)],
        markersize=3.5,
        linewidth=1.1,
        linestyle="-" if joined is None else "none",
        elinewidth=0.8,
        capsize=1.5,
        label=label,
    )
    if joined is not None:
        axis.plot(np.asarray(x, float)[:joined] + shift, values[:joined], color=PALETTE[place % 7], linewidth=1.1)


def draw_matrix(
    axis: Any,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str = ".0f",
    signed: bool = False,
    significant: np.ndarray | None = None,
    bar: bool = True,
) -> None:
    """A heat map with its numbers in the cells (signed: blue above 0, red below); `significant` cells are bold with a
    dot."""
    import seaborn

    finite = values[np.isfinite(values)]
    high = (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0
    strong = np.zeros(values.shape, bool) if significant is None else significant
    texts = [
        [format(value, form).replace("-", "−") + ("•" if mark else "") for value, mark in zip(*line, strict=True)]
        for line in zip(values, strong, strict=True)
    ]
    seaborn.heatmap(
        values,
        mask=~np.isfinite(values),
        ax=axis,
        cmap="RdBu" if signed else "viridis",
        vmin=-high if signed else 0.0,
        vmax=high,
        annot=np.array(texts, dtype=object).reshape(values.shape),
        fmt="",
        annot_kws={"fontsize": 6.5},
        xticklabels=list(columns),
        yticklabels=list(rows),
        cbar=bar,
        cbar_kws={"fraction": 0.046, "pad": 0.02},
    )
    for text in axis.texts:
        if text.get_text().endswith("•"):
            text.set_fontweight("bold")
    axis.set_title(title)
    axis.tick_params(length=0, rotation=0)
