"""Reading every latent and layer of many prompts through lenses: what the model is run for in `codi lens detect`.

A value counts as read at (latent, layer) with k if it is among the k most probable tokens there; how a number is
spelled is in spellings.py, which values are looked for in targets.py. Knows nothing about statistics, files or figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codi import CodiModel
from codi.decode import decode_answers
from experiments.lens.detection import Detection
from experiments.lens.options import TOP, Rule
from experiments.lens.prompts import batches, clusters_of
from experiments.lens.targets import Targets, donor_rates
from experiments.study.spellings import (
    NEVER,
    number_spellings,
    number_tokens,
    ranks,
    spelling_table,
    with_absent,
    word_spellings,
)
from experiments.tasks import Problem
from lenses.latent_lens import LatentLens, States, latent_states

__all__ = ["detect", "shared_positions"]


def shared_positions(model: CodiModel, lenses: Sequence[LatentLens], problems: Sequence[Problem]) -> tuple[int, ...]:
    """The positions that all lenses read.

    Raises:
        ValueError: there is none, fewer than 2 problems, or a vocabulary that is too small.
    """
    if len(problems) < 2:
        raise ValueError(f"detection needs at least 2 problems (chance level: the others' values), got {len(problems)}")
    if model.vocab_size < TOP:
        raise ValueError(f"detection needs a vocabulary of at least {TOP} tokens, got {model.vocab_size}")
    positions = tuple(k for k in range(model.n_latents + 1) if all(lens.reads(k) for lens in lenses))
    if not positions:
        raise ValueError("these lenses have no position in common")
    return positions


def detect(
    model: CodiModel,
    lenses: Sequence[LatentLens],
    problems: Sequence[Problem],
    *,
    rule: Rule = "first",
    donors: int = 20,
    words: Sequence[str] = ("therefore",),
    frequency_k: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> Detection:
    """Read every position and layer of every prompt through every lens.

    Args:
        model: the model.
        lenses: all of one model; a position that a lens does not read is left out for all.
        problems: at least 2, with known answers.
        rule: how numbers of several tokens count.
        donors: other prompts per prompt behind the chance level.
        words: word families, in lower case.
        frequency_k: k of the `reads` of answer values.
        batch_size: prompts at once.
        seed: of the choice of donors.
        advance: called with the number of prompts just read.

    Raises:
        ValueError: fewer than 2 problems, fewer than 1 donor, or lenses without a common position.
    """
    positions = shared_positions(model, lenses, problems)
    if donors < 1:
        raise ValueError(f"donors must be at least 1, got {donors}")
    if not 1 <= frequency_k <= TOP:
        raise ValueError(f"frequency-k must be in 1..{TOP}, got {frequency_k}")
    targets = Targets.of(problems, donors, seed)
    sheet = _Sheet(model, lenses, targets, positions, rule, words, frequency_k)
    right = np.zeros(len(problems), bool)
    for rows in batches(problems, batch_size):
        batch = model.encode([problems[i].question for i in rows])
        with torch.no_grad():
            run = model.rollout(batch, model.n_latents, keep=("hidden_states", "cache"))
            for i, text in zip(rows, decode_answers(model, run).texts, strict=True):
                right[i] = problems[i].is_answered_by(text)
            sheet.fill(rows, run)
        advance(len(rows))
    values = targets.values[targets.answers]
    own = [{float(v) for v in (*p.intermediates, p.answer)} for p in problems]
    return Detection(
        prompt_ids=np.array([problem.prompt_id for problem in problems], dtype=object),
        clusters=np.array(clusters_of(problems), dtype=object),
        lenses=tuple(lens.name for lens in lenses),
        positions=positions,
        targets=targets.names,
        right=right,
        multi_token=targets.all_of(sheet.several),
        words=tuple(words),
        single_token_spellings=tuple(sum(len(ids) == 1 for ids in forms) for forms in sheet.word_forms),
        values=values,
        is_answer=np.array([float(p.answer) for p in problems])[:, None] == values,
        is_own=np.array([[value in mine for value in values] for mine in own]),
        **sheet.filled,
    )


class _Sheet:
    """The arrays of a `Detection`, filled batch by batch, and the spellings that are looked for.

    Args:
        model, lenses, positions: what is read.
        targets: values of the prompts and their donors.
        rule: how numbers of several tokens count.
        words: word families.
        frequency_k: k of `reads`.
    """

    def __init__(
        self,
        model: CodiModel,
        lenses: Sequence[LatentLens],
        targets: Targets,
        positions: tuple[int, ...],
        rule: Rule,
        words: Sequence[str],
        frequency_k: int,
    ) -> None:
        self.lenses, self.targets, self.positions, self.frequency_k = lenses, targets, positions, frequency_k
        self.numeric, self.device = number_tokens(model), model.device
        spelled = [number_spellings(model.tokenizer, value) for value in targets.values]
        self.several = np.array([all(len(ids) > 1 for ids in forms) for forms in spelled])
        self.spelling = with_absent(spelling_table(spelled, rule))
        self.word_forms = [word_spellings(model.tokenizer, word) for word in words]
        self.words = spelling_table(self.word_forms, "all") if words else torch.zeros(0, 1, 1, dtype=torch.long)
        n = len(targets.where)
        shape = (len(lenses), n, len(positions), model.n_layers + 1)
        self.filled: dict[str, Any] = {
            "rank": np.zeros((*shape, len(targets.names)), np.int8),
            "chance": np.full((*shape, len(targets.names), TOP), np.nan, np.float32),
            "entropy": np.zeros(shape, np.float32),
            "divergence": np.zeros(shape, np.float32),
            "number_first": np.zeros(shape, bool),
            "word_rank": np.full((*shape, len(words)), NEVER, np.int8),
            "reads": np.zeros((len(lenses), n, len(targets.answers)), np.float32),
        }

    def fill(self, rows: list[int], run: Any) -> None:
        """Read one batch.

        Args:
            rows: which prompts it holds.
            run: their rollout, with hidden states.
        """
        targets, n_layers = self.targets, self.filled["rank"].shape[3]
        wanted = {
            "own": self.spelling[torch.from_numpy(targets.where[rows])],
            "foreign": self.spelling[torch.from_numpy(targets.foreign[rows].reshape(len(rows), -1))],
            "answers": self.spelling[torch.from_numpy(targets.answers)].expand(len(rows), -1, -1, -1),
            "words": self.words.expand(len(rows), -1, -1, -1),
        }
        wanted = {name: table.to(self.device) for name, table in wanted.items()}
        thinking = sum(position > 0 for position in self.positions) * n_layers
        for j, position in enumerate(self.positions):
            states = latent_states(run, [position])
            output = self.lenses[0].unembed.unembedding(run.states[:, position].float()).log_softmax(-1)
            for layer in range(n_layers):
                for i, lens in enumerate(self.lenses):
                    top = self._measure((i, rows, j, layer), lens, states, output)
                    self._look_for((i, rows, j, layer), top, wanted)
                    if position > 0:
                        seen = ranks(top[:, : self.frequency_k], wanted["answers"]).cpu().numpy() <= self.frequency_k
                        self.filled["reads"][i, rows] += seen / thinking

    def _measure(self, at: tuple[int, list[int], int, int], lens: LatentLens, states: States, output: Tensor) -> Tensor:
        """Entropy, divergence and number tokens at one place; gives back the most probable tokens (row, TOP)."""
        log_p = lens.log_probs(states, at[3])
        top = log_p.topk(TOP, dim=-1).indices
        divergence = (output.exp() * (output - log_p)).sum(-1).clamp(min=0)
        self.filled["entropy"][at] = -(log_p.exp() * log_p).sum(-1).cpu().numpy()
        self.filled["divergence"][at] = divergence.cpu().numpy()
        self.filled["number_first"][at] = self.numeric[top[:, 0].cpu().numpy()]
        return top

    def _look_for(self, at: tuple[int, list[int], int, int], top: Tensor, wanted: dict[str, Tensor]) -> None:
        """Ranks of a prompt's own values, its donors' and the words at one place."""
        targets, rows = self.targets, at[1]
        found = targets.ranks(ranks(top, wanted["own"]).cpu().numpy(), targets.where[rows] < 0)
        self.filled["rank"][at] = np.where(found == NEVER + 1, 0, found)
        foreign = targets.foreign[rows]
        donated = ranks(top, wanted["foreign"]).cpu().numpy().reshape(foreign.shape)
        self.filled["chance"][at] = donor_rates(targets.ranks(donated, foreign < 0))
        if self.word_forms:
            self.filled["word_rank"][at] = ranks(top, wanted["words"]).cpu().numpy()
