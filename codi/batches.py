"""Training problems as token ids: what teacher, student and direct answer read, and where the results of steps stand.

Problems come in as text: a question, a written chain such as "<<7+5=12>><<12*3=36>>" and an answer. Knows nothing about
tasks, files or losses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any
from typing import Protocol as Shape

import torch
from torch import Tensor

from codi.parts import Parts
from lm.text import EncodedBatch, left_padded

__all__ = ["Example", "TrainingBatch", "collate"]


class Example(Shape):
    """What a training problem must offer: question, written chain of thought, answer text."""

    @property
    def question(self) -> str: ...

    @property
    def chain(self) -> str: ...

    @property
    def answer_text(self) -> str: ...


@dataclass
class TrainingBatch:
    """Token ids of one batch of problems.

    Attributes:
        prefix: question and the protocol tokens that every part shares, left padded.
        verbal, verbal_mask, verbal_read: (batch, position) what the teacher reads after the prefix, right padded; which
            of it is real; and the position (batch,) of its last token before the answer.
        latent: tokens fed before latent 1, after the prefix (the same for every problem).
        answer, answer_mask, answer_read: as verbal, for what the student reads after its latents.
        direct, direct_mask: as verbal, for the direct answer.
        step_read: (batch, step) position in `verbal` of the token before the result of each step; -1 where there is no
            such step.
        verbal_start, direct_start, answer_start: number of leading tokens in each that are given, not predicted.
        step_ids, step_mask: (batch, step, position) tokens of each step ("<<7+5=12>>"), right padded, and which are
            real; None: not asked for.
        target, step_states: (batch, layer, d_model) and (batch, step, d_model) what the teacher was found to give
            (codi/targets.py); None: it is asked.
    """

    prefix: EncodedBatch
    verbal: Tensor
    verbal_mask: Tensor
    verbal_read: Tensor
    latent: Tensor
    answer: Tensor
    answer_mask: Tensor
    answer_read: Tensor
    direct: Tensor
    direct_mask: Tensor
    step_read: Tensor
    verbal_start: int
    answer_start: int
    direct_start: int
    step_ids: Tensor | None = None
    step_mask: Tensor | None = None
    target: Tensor | None = None
    step_states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.verbal)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on another device."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.__dict__.items()}
        return TrainingBatch(**moved)


def _right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def collate(problems: Sequence[Example], model: Parts, steps: bool = False) -> TrainingBatch:
    """Tokenize problems for `TeacherLoss` and `DistillationLoss`.

    Args:
        problems: at least one; `chain` is the written chain of thought, `answer_text` what stands after it.
        model: for its tokenizer and protocol.
        steps: also the tokens of each step, for a decoder of latents.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("a training batch needs at least one problem, got none")
    protocol, tokenizer = model.protocol, model.tokenizer
    shared = commonprefix([protocol.before_latents, protocol.before_verbal, protocol.before_direct])
    questions = tokenizer([p.question for p in problems])["input_ids"]
    prefixes = [[*ids, *shared] for ids in questions]
    chains = tokenizer([p.chain for p in problems], add_special_tokens=False)["input_ids"]
    answers = tokenizer([p.answer_text for p in problems], add_special_tokens=False)["input_ids"]
    end = [protocol.eos_id]
    # In protocols with a bare-number answer the end-of-thought token also ends a written chain.
    bridge = [protocol.eot_id] if protocol.answer_style == "number" else []
    lead = list(protocol.before_verbal[len(shared) :])
    verbal = [[*lead, *c, *bridge, *a, *end] for c, a in zip(chains, answers, strict=True)]
    # The token whose state is distilled stands just before the first answer token that carries the number.
    ahead = [0 if bridge else _lead_length(tokenizer, p.answer_text) for p in problems]
    verbal_read = [len(lead) + len(c) + len(bridge) - 1 + s for c, s in zip(chains, ahead, strict=True)]
    after = list(protocol.after_latents)
    answer = [[*after, *a, *end] for a in answers]
    before_direct = list(protocol.before_direct[len(shared) :])
    direct = [[*before_direct, *a, *end] for a in answers]

    verbal_ids, verbal_mask = _right_padded(verbal, protocol.pad_id)
    answer_ids, answer_mask = _right_padded(answer, protocol.pad_id)
    direct_ids, direct_mask = _right_padded(direct, protocol.pad_id)
    step_ids, step_mask = _steps(tokenizer, [p.chain for p in problems], protocol.pad_id) if steps else (None, None)
    return TrainingBatch(
        prefix=left_padded(prefixes, protocol.pad_id),
        verbal=verbal_ids,
        verbal_mask=verbal_mask,
        verbal_read=torch.tensor(verbal_read),
        latent=torch.tensor(protocol.before_latents[len(shared) :]),
        answer=answer_ids,
        answer_mask=answer_mask,
        answer_read=torch.tensor([len(after) - 1 + s for s in ahead]),
        direct=direct_ids,
        direct_mask=direct_mask,
        step_read=_step_ends(tokenizer, [p.chain for p in problems], len(lead)),
        verbal_start=len(lead),
        answer_start=len(after),
        direct_start=len(before_direct),
        step_ids=step_ids,
        step_mask=step_mask,
    )


def _step_ends(tokenizer: Any, chains: Sequence[str], lead: int) -> Tensor:
    """(row, step) place of the token before each result of chains such as "<<7+5=12>>", counted from `lead`; -1: none.

    A chain in which some result does not begin a token of its own counts as having no steps, as does every chain of a
    tokenizer that reports no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return torch.full((len(chains), 1), -1)
    rows: list[list[int]] = []
    for chain in chains:
        encoded = tokenizer(chain, add_special_tokens=False, return_offsets_mapping=True)
        starts = {begin: i for i, (begin, _) in enumerate(encoded["offset_mapping"])}
        places = [starts.get(found.end(), 0) for found in re.finditer(r"=(?=[^=<>]+>>)", chain)]
        rows.append([lead + place - 1 for place in places] if all(places) else [])
    width = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _steps(tokenizer: Any, chains: Sequence[str], pad_id: int) -> tuple[Tensor, Tensor]:
    """(row, step, position) tokens of the steps of each chain, right padded, and which of them are real."""
    texts = [re.findall(r"<<[^<>]+>>", chain) for chain in chains]
    width = max(1, *map(len, texts))
    flat = [text for row in texts for text in row]
    tokens = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
    rows = [next(tokens) if k < len(row) else [] for row in texts for k in range(width)]
    ids, mask = _right_padded([*rows, [pad_id]], pad_id)  # a row that keeps the width above 0
    shape = (len(chains), width, -1)
    return ids[:-1].view(shape), mask[:-1].view(shape)


def _lead_length(tokenizer: Any, answer_text: str) -> int:
    """Tokens of "The answer is: 42" before those of the number."""
    words, colon, _ = answer_text.rpartition(":")
    return len(tokenizer(words + colon, add_special_tokens=False)["input_ids"]) if colon else 0
