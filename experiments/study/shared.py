"""What studies that are not yet data share (see run.py): old names of options, folder and rows; and, until their rooms
are there, row-wise interventions, forced answers, paired tables and figures.

Its trial tables have one row per prompt, `condition` and `draw`. New studies use options.py, parts.py, run.py,
answers.py, thoughts.py, experiments/statistics and experiments/figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
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
from experiments.study import answers, options
from experiments.study.claims import ClaimsTable, effect_claim
from experiments.study.folder import RunFolder, open_run
from experiments.study.thoughts import Bank, Thoughts, think
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
        return self.statistics(self.seed)


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
        """Make figures in the one style, say below each what it rests on, write it as figures/{name}.png and .pdf."""
        with in_style():
            for name, figure in make().items():
                note(figure, " ".join([self.sample, MARKS] if marked(figure) else [self.sample]))
                save(figure, f"figures/{name}", self.folder.write)

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
        sample = (
            f"{len(split.evaluation):,} prompts in {len({p.cluster for p in split.evaluation}):,} clusters. "
            f"Intervals: 95 % over clusters. Model: {Path(config.model).name}."
        )
        yield StudyFolder(folder, say, sample)


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


