"""Samples of the reasoner as token ids: those of a step as a pure function of seed and step, batches of similar length,
and the loss on their completions.

Knows nothing about adapters, optimisers or files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.tasks.reasoner import MIXTURE, Mode, Sample, stream
from experiments.tune.options import TuneOptions

__all__ = ["Batch", "batches", "collate", "completion_loss", "samples_of_step"]

ONTOLOGIES = {task: weight for task, weight in MIXTURE.items() if task.startswith("ontology")}
"""Tasks that have demonstrations before them, with their weights."""

LATE_MIXTURE = {
    "ontology-1": 0.5, "ontology-2": 1.0, "ontology-3": 2.0, "babi-15": 0.5, "babi-16": 2.0, "arithmetic": 4.0,
}  # fmt: skip
"""Relative frequency of each task after three eighths of the steps: what is learned last comes more often."""
LATE_MODES: dict[Mode, float] = {"steps": 3.0, "direct": 1.0, "neutral": 1.0}
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
    late = step >= options.steps * 3 // 8
    plain = stream(seed, mixture=LATE_MIXTURE, modes=LATE_MODES) if late else stream(seed)
    shown = stream(f"{seed}-shown", mixture=ONTOLOGIES, modes={"steps": 1.0}, demonstrations=options.demonstrations)
    return [next(shown if rng.random() < options.demonstrated else plain) for _ in range(options.batch_size)]


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
