"""What the intervention studies share: options, run folder, rows of answers, paired tables, claims and figures.

A study asks one question in many *conditions*: the same prompts, answered while something is replaced, blocked or left
out. Its trial table has one row per prompt, condition and draw, with the columns `condition`, `draw`, `prompt_id`,
`cluster`, `template`, `operation`, `answer`, `text`, `prediction`, `parsed`, `correct`, and what the study adds. Every
number comes from that table: `levels` gives a mean with its clustered interval, `compare` a paired difference between
two conditions with exact and corrected p-values (statistics of experiments/stats.py).

What it does not know: what is replaced and why. Used by experiments/necessity.py, patch.py, transfer.py, pca.py,
anchors.py and early_exit.py.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from codi import Intervention, LatentRollout, Prefill
from codi.decode import decode_answers
from experiments.study.claims import Claim, ClaimsTable, Verdict
from experiments.study.folder import RunFolder, versions
from experiments.sweep.cells import (
    Settings,
    bootstrap_interval,
    cluster_weights,
    max_statistic_p,
    mcnemar_p,
    sign_flip_p,
)
from experiments.tasks import TASK_NAMES, Problem, extract_answer, is_correct, with_suffix
from experiments.tasks import templates as template_task
from experiments.tasks.split import Split, load_split
from steering.directions import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from codi import CodiModel

__all__ = [
    "PALETTE",
    "Bank",
    "Result",
    "StudyFolder",
    "StudyOptions",
    "Thoughts",
    "answer_rows",
    "answer_table",
    "compare",
    "draw_matrix",
    "draw_series",
    "effect_claim",
    "interval",
    "levels",
    "load_model",
    "load_prompts",
    "markdown",
    "new_figure",
    "open_study",
    "p_text",
    "row_of",
    "rows_of",
    "stderr",
    "think",
]

FORMAT = 1
LEGACY_TRIPLES = 50
"""Number triples of the published prompt set: 50 × 10 scenes × 2 operations = 1,000 prompts."""


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyOptions:
    """Options that every intervention study has."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    out: Path = Path("runs/study")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    task: str = "templates"
    """Evaluation prompts: templates, arithmetic, a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id."""
    limit: int | None = 160
    """Number of evaluation prompts (a seeded choice); None: all."""
    min_steps: int | None = None
    """Only problems of at least this many steps; None: no bound. Not used for templates."""
    max_steps: int | None = None
    """Only problems of at most this many steps; None: no bound. Not used for templates."""
    derivation: int = 1120
    """Most prompts that means and donors are taken from. They share no question and no numbers with the evaluation
    prompts (checked)."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""
    legacy: bool = False
    """The published protocol where numbers were published with it; what it changes is said in the study's own help."""
    seed: int = 0
    """Seed of prompts, draws and statistics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    batch_size: int = 256
    """Rows computed at once."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: 16 for models that answer with a number, 64 for a sentence."""
    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""
    permutations: int = 5000
    """Random sign flips behind every family-wise p-value."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published ratio."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    rope: Literal["float32", "published"] = "float32"
    """Rotary frequencies: kept in float32, or rounded as published runs in bfloat16 do."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.derivation < 2:
            raise ValueError(f"derivation must be at least 2 prompts, got {self.derivation}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        for name in ("draws",):
            value = getattr(self, name, 1)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def asked(self) -> str:
        """What the prompts are called in a summary."""
        return "templates (the published choice)" if self.legacy and self.task in TASK_NAMES else self.task

    @property
    def settings(self) -> Settings:
        """How the statistics are computed."""
        return Settings(resamples=self.resamples, permutations=self.permutations, seed=self.seed)


_NOT_IDENTITY = ("model", "out", "batch_size", "device", "resamples", "permutations")


def load_model(config: StudyOptions, attention: Literal["sdpa", "eager"] = "sdpa") -> CodiModel:
    """The model that the options name."""
    from codi import load_codi

    return load_codi(
        config.model,
        base=config.base,
        protocol=config.protocol,
        device=None if config.device == "auto" else config.device,
        dtype=config.dtype,
        mask=config.mask,
        rope=config.rope,
        lora_alpha=config.lora_alpha,
        attention=attention,
    )


def load_prompts(config: StudyOptions, suffix: str = "", known_steps: int = 0) -> Split:
    """Evaluation and derivation prompts.

    With `legacy` and a generated task: the template set, the published choice of the first 50 number triples (all their
    prompts, or `limit` of them), which are also the prompts that means are taken from.

    Args:
        config: options.
        suffix: text the checkpoint expects after every question; used unless `config.suffix` is off.
        known_steps: the study needs prompts with at least so many known intermediate values.

    Raises:
        ValueError: as `load_split`, or prompts without the intermediate values that are needed.
    """
    text = suffix if config.suffix else ""
    if config.legacy and config.task in TASK_NAMES:
        chosen = {f"{x},{y},{z}" for x, y, z in template_task.triples()[:LEGACY_TRIPLES]}
        problems = [problem for problem in template_task.generate(split="all") if problem.cluster in chosen]
        if config.limit is not None and config.limit < len(problems):
            keep = np.sort(generator(config.seed, "legacy-limit").permutation(len(problems))[: config.limit])
            problems = [problems[i] for i in keep]
        problems = with_suffix(problems, text)
        split = Split(tuple(problems), tuple(problems))
    else:
        split = load_split(
            config.task,
            limit=config.limit,
            derivation=config.derivation,
            seed=config.seed,
            suffix=text,
            min_steps=None if config.task == "templates" else config.min_steps,
            max_steps=None if config.task == "templates" else config.max_steps,
            legacy=config.legacy,
        )
    if known_steps:
        lacking = [p for p in (*split.evaluation, *split.derivation) if len(p.intermediates) < known_steps]
        if lacking:
            raise ValueError(
                f"{config.task}: this study needs prompts with {known_steps} known intermediate values; "
                f"{lacking[0].prompt_id!r} has {len(lacking[0].intermediates)}: use the task 'templates' or "
                "prompts.json"
            )
    return split


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
        path = self.folder.part_path(name)
        mark = self.folder.fingerprint.encode()
        try:
            found = pq.read_table(path, page_checksum_verification=True)
        except (FileNotFoundError, pa.ArrowException, OSError, ValueError):
            found = None
        if found is not None and (found.schema.metadata or {}).get(b"codi-run") == mark:
            return found.to_pandas()
        began = time.time()
        frame = compute().reset_index(drop=True)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"codi-run": mark})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        self.folder.write(f"trials/part-{name}.parquet", buffer.getvalue())
        self.say(f"  {name}: {len(frame):,} rows in {time.time() - began:.0f} s")
        return pq.read_table(io.BytesIO(buffer.getvalue())).to_pandas()

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
            claims.write(self.path)
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
    options = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_IDENTITY}
    identity = {
        "study": name,
        "format": FORMAT,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "split": split.record(),
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
    }
    say = say or (lambda line: None)
    folder = RunFolder(config.out)
    began = time.time()
    with folder.open(identity, {"model": config.model, "versions": versions()}) as known:
        say(
            f"{'continuing' if known else 'starting'} {name}: {config.model}, {len(split.evaluation)} prompts in "
            f"{len({p.cluster for p in split.evaluation})} clusters"
        )
        yield StudyFolder(folder, say)
        sittings = folder.manifest().get("sittings", [])
        folder.add_to_manifest(sittings=[*sittings, {"seconds": round(time.time() - began, 1)}])


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


# --- Latents that were thought ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thoughts:
    """Prompts, computed once, and what their latents were without any intervention.

    Attributes:
        problems: the prompts.
        prefill: computed prompts, row i = problem i; studies continue from it and never change it.
        run: the unedited rollout with its cache.
    """

    problems: tuple[Problem, ...]
    prefill: Prefill
    run: LatentRollout

    def __len__(self) -> int:
        return len(self.problems)


def think(
    model: CodiModel,
    problems: Sequence[Problem],
    keep: Sequence[str] = ("embeddings", "hidden_states", "keys", "values", "cache"),
) -> Thoughts:
    """Compute prompts and their unedited latents."""
    prefill = model.prefill(model.encode([problem.question for problem in problems]))
    return Thoughts(tuple(problems), prefill, model.rollout(prefill, model.n_latents, keep=tuple(keep)))


@dataclass(frozen=True)
class Bank:
    """What the latents of many prompts are: the source of means and donors. All on the CPU.

    Attributes:
        problems: the prompts.
        embeddings: (prompt, latent, d_model) z_1..z_n.
        states: (prompt, latent 0..n, d_model) h_0..h_n.
        hidden_states: (prompt, latent, layer, d_model).
    """

    problems: tuple[Problem, ...]
    embeddings: Tensor
    states: Tensor
    hidden_states: Tensor

    @classmethod
    def collect(cls, model: CodiModel, problems: Sequence[Problem], batch_size: int = 128) -> Bank:
        """Roll out every prompt."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(problems), batch_size):
            chunk = problems[start : start + batch_size]
            batch = model.encode([problem.question for problem in chunk])
            run = model.rollout(batch, model.n_latents, keep=("embeddings", "hidden_states"))
            assert run.embeddings is not None and run.hidden_states is not None
            parts.append((run.embeddings.cpu(), run.states.cpu(), run.hidden_states.cpu()))
        z, h, layers = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(tuple(problems), z, h, layers)

    def mean(self, members: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over some of the prompts: embeddings (latent, d_model), states, hidden_states."""
        rows = torch.as_tensor(members, dtype=torch.long)
        assert len(rows), "a mean needs at least one prompt"
        sources = (self.embeddings, self.states, self.hidden_states)
        embeddings, states, hidden = (x[rows].double().mean(0).to(x.dtype) for x in sources)
        return embeddings, states, hidden


# --- Rows -------------------------------------------------------------------------------------------------------------

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


def answer_table(
    problems: Sequence[Problem], prompt: Sequence[int] | Tensor, texts: Sequence[str], **columns: Any
) -> pd.DataFrame:
    """Rows of the trial table.

    Args:
        problems: the prompts.
        prompt: (row,) index into them.
        texts: (row,) answers.
        **columns: scalars or (row,) values; `condition` must be among them, `draw` is 0 if it is not.
    """
    rows = [int(i) for i in prompt]
    numbers = {text: extract_answer(text) for text in set(texts)}
    judged = {
        key: is_correct(*key) for key in {(text, problems[i].answer) for text, i in zip(texts, rows, strict=True)}
    }
    frame = {
        "prompt_id": [problems[i].prompt_id for i in rows],
        "cluster": [problems[i].cluster or problems[i].prompt_id for i in rows],
        "template": [problems[i].template for i in rows],
        "operation": [problems[i].operation for i in rows],
        "answer": [float(problems[i].answer) for i in rows],
        "text": list(texts),
        "prediction": [np.nan if numbers[text] is None else float(numbers[text] or 0.0) for text in texts],
        "parsed": [numbers[text] is not None for text in texts],
        "correct": [judged[text, problems[i].answer] for text, i in zip(texts, rows, strict=True)],
    }
    table = pd.DataFrame({"draw": 0, **columns, **frame}, index=range(len(rows)))
    assert "condition" in table, "every row of a trial table belongs to a condition"
    return table


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


def effect_claim(
    name: str,
    statement: str,
    rule: str,
    verdict: Verdict,
    row: pd.Series | Mapping[str, Any],
    note: str = "",
    of: str = "difference",
) -> Claim:
    """A claim that rests on one row of a table of `levels` (of="mean") or `compare`."""
    return Claim(
        name,
        statement,
        rule,
        verdict,
        float(row[of]),
        float(row["lower"]),
        float(row["upper"]),
        int(row["n"]),
        int(row["n_clusters"]),
        note,
    )


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
