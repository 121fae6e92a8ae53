"""What the intervention studies share: options, run folder, rows of answers, paired tables, claims and figures.

A study asks one question in many *conditions*: the same prompts, answered while something is replaced, blocked or left
out. Its trial table has one row per prompt, condition and draw, with the columns `condition`, `draw`, `prompt_id`,
`cluster`, `template`, `operation`, `answer`, `text`, `prediction`, `parsed`, `correct`, and what the study adds. Every
number comes from that table: `levels` gives a mean with its clustered interval, `compare` a paired difference between
two conditions with exact and corrected p-values (experiments/statistics).

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
from torch import Tensor

from codi import Intervention, LatentRollout, Prefill
from codi.branches import BranchAnswers, Branches, EditTable, Timing, decode_branches
from codi.cache import clone_cache
from codi.decode import decode_answers
from codi.rollout import feed, overrides
from experiments.figures.heatmap import MARKS, draw_matrix, marked
from experiments.figures.series import draw_series
from experiments.figures.style import PALETTE, in_style, new_figure, note, save
from experiments.statistics import effects
from experiments.statistics.clusters import Settings
from experiments.statistics.words import interval, markdown, p_text
from experiments.study.claims import Claim, ClaimsTable, Verdict
from experiments.study.folder import RunFolder, versions
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
        sample: what a figure rests on, for its caption.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None], sample: str = "") -> None:
        self.folder, self.say, self.sample = folder, say, sample
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
        """Make figures in the one style, say below each what it rests on, write it as figures/{name}.png and .pdf."""
        with in_style():
            for name, figure in make().items():
                note(figure, " ".join([self.sample, MARKS] if marked(figure) else [self.sample]))
                save(figure, f"figures/{name}", self.folder.write)

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
        sample = (
            f"{len(split.evaluation):,} prompts in {len({p.cluster for p in split.evaluation}):,} clusters. "
            f"Intervals: 95 % over clusters. Model: {Path(config.model).name}."
        )
        yield StudyFolder(folder, say, sample)
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


def levels(trials: pd.DataFrame, outcome: str = "correct", settings: Settings | None = None) -> pd.DataFrame:
    """Mean of an outcome in every condition that a word names: `effects.levels` by the column condition."""
    return effects.levels(trials, ["condition"], outcome, settings)


def compare(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[str, str]],
    outcome: str = "correct",
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Paired differences between conditions that a word names: `effects.compare` by the column condition."""
    chosen = [({"condition": a}, {"condition": b}) for a, b in contrasts]
    found = effects.compare(trials, chosen, ["condition"], outcome, settings)
    return found.rename(columns={"reference_condition": "reference"})


# --- Words ------------------------------------------------------------------------------------------------------------


def row_of(table: pd.DataFrame, condition: str, reference: str | None = None) -> dict[str, Any]:
    """The one row of a table with this condition (and reference)."""
    chosen = {"condition": condition} | ({} if reference is None else {"reference": reference})
    return effects.row_of(table, chosen)


def rows_of(table: pd.DataFrame, conditions: Sequence[str], **chosen: Any) -> pd.DataFrame:
    """The rows with these conditions, in that order, where the other columns have the chosen values."""
    return effects.rows_of(table, [{"condition": name, **chosen} for name in conditions])


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
