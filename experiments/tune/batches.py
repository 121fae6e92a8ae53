"""Samples of the reasoner as token ids: those of a step as a pure function of seed and step, batches of similar length,
and the loss on their completions.

Knows nothing about adapters, optimisers or files.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from codi.training import cosine_schedule
from experiments.tasks.reasoner import MIXTURE, MODES, TASKS, Mode, Sample, stream
from experiments.tune.options import TuneOptions

__all__ = ["PHASES", "Batch", "Phase", "batches", "collate", "completion_loss", "learning_rate", "samples_of_step"]

ONTOLOGIES = {task: weight for task, weight in MIXTURE.items() if task.startswith("ontology")}
"""Tasks that have demonstrations before them, with their weights."""


@dataclass(frozen=True)
class Phase:
    """Part of a training. Tasks that are learned last come more often later.

    Attributes:
        begins: share of the steps before it.
        mixture: relative frequency of each task.
        modes: relative frequency of each way of asking.
    """

    begins: Fraction
    mixture: Mapping[str, float]
    modes: Mapping[Mode, float]


def _phase(begins: Fraction, tasks: Sequence[float], modes: Sequence[float]) -> Phase:
    return Phase(begins, dict(zip(TASKS, tasks, strict=True)), dict(zip(get_args(Mode), modes, strict=True)))


PHASES = (
    Phase(Fraction(0), MIXTURE, MODES),
    _phase(Fraction(3, 8), (0.5, 1.0, 2.0, 0.5, 2.0, 4.0), (3.0, 1.0, 1.0)),
    _phase(Fraction(21, 32), (0.25, 0.5, 3.0, 0.25, 4.0, 2.5), (4.0, 1.0, 1.0)),
)
RESTART = 0.6
"""Share of the highest learning rate that the last phase begins with; until then it falls as without a last phase."""
SLACK = 1.5
"""A single long text would otherwise pad all that are computed with it."""


@dataclass(frozen=True)
class Batch:
    """Texts as token ids, padded on the right: padding is never seen, since no token looks ahead.

    Attributes:
        input_ids: (batch, position) prompt, completion and the end of the text.
        rows, columns: (target,) where the model predicts a token of a completion: the position before it.
        targets: (target,) that token.
    """

    input_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in ("input_ids", "rows", "columns", "targets")))


def samples_of_step(options: TuneOptions, step: int) -> list[Sample]:
    """The samples of one step: a pure function of its arguments."""
    seed = f"{options.seed}-{step}"
    rng = random.Random(f"tune-{seed}")
    phase = [phase for phase in PHASES if step >= phase.begins * options.steps][-1]
    plain = stream(seed, mixture=phase.mixture, modes=phase.modes)
    shown = stream(f"{seed}-shown", mixture=ONTOLOGIES, modes={"steps": 1.0}, demonstrations=options.demonstrations)
    return [next(shown if rng.random() < options.demonstrated else plain) for _ in range(options.batch_size)]


def learning_rate(step: int, n_steps: int) -> float:
    """Share of the highest learning rate at a step: warm-up and cosine, begun anew in the last phase, without warm-up.

    Source: warm restarts, Loshchilov and Hutter 2017, arXiv 1608.03983.
    """
    last = math.ceil(PHASES[-1].begins * n_steps)
    if step < last:
        return cosine_schedule(step, n_steps)
    return RESTART * cosine_schedule(step - last, n_steps - last, warmup=0.0)


def collate(tokenizer: Any, samples: Sequence[Sample]) -> Batch:
    """Samples as a batch.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample, got none")
    prompts, texts = _tokens(tokenizer, samples)
    input_ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        input_ids[row, : len(text)] = torch.tensor(text)
        rows += [row] * (len(text) - len(prompt))
        columns += range(len(prompt) - 1, len(text) - 1)
        targets += text[len(prompt) :]
    return Batch(input_ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))


def batches(tokenizer: Any, samples: Sequence[Sample], size: int) -> Iterator[Batch]:
    """Batches of up to `size` samples of similar length (the longest at most SLACK times the shortest); every sample is
    in one of them."""
    lengths = [len(text) for text in _tokens(tokenizer, samples)[1]]
    part: list[int] = []
    for i in sorted(range(len(samples)), key=lengths.__getitem__):
        if len(part) == size or (part and lengths[i] > SLACK * lengths[part[0]]):
            yield collate(tokenizer, [samples[j] for j in part])
            part = []
        part.append(i)
    if part:
        yield collate(tokenizer, [samples[j] for j in part])


def completion_loss(base: Any, batch: Batch) -> Tensor:
    """() sum of the cross-entropies, in nats, of the tokens of the completions; the prompts are not learned.

    Only the positions that predict a completion's token go through the unembedding.

    Args:
        base: Hugging Face causal language model.
        batch: on its device.
    """
    states = base.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits = base.get_output_embeddings()(states[batch.rows, batch.columns])
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def _tokens(tokenizer: Any, samples: Sequence[Sample]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the whole texts with the token that ends them."""
    prompts = tokenizer([sample.prompt for sample in samples])["input_ids"]
    completions = tokenizer([sample.completion for sample in samples], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return prompts, [[*prompt, *text, *end] for prompt, text in zip(prompts, completions, strict=True)]
