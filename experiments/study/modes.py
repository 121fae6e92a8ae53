"""Answers in every way a CODI model can give one: after 0..n latents, directly, and after a written chain of thought.

The prompt and the longest thought are computed once per problem; an answer after k latents starts from that run cut
after latent k. Knows nothing about files or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch

from codi.decode import decode_answers, default_new_tokens
from experiments.study.answers import judged, reading_of
from experiments.tasks import Problem
from lm.terms import ANSWER_MODES, AnswerMode

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["evaluate"]


def evaluate(
    model: CodiModel,
    problems: Sequence[Problem],
    modes: Sequence[AnswerMode] = ANSWER_MODES,
    latents: Sequence[int] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    advance: Callable[[int], object] = lambda answers: None,
) -> pd.DataFrame:
    """Answer every problem under every condition.

    Args:
        model: the model.
        problems: at least one.
        modes: ways of answering.
        latents: numbers of latents for mode "latent"; None: 0 to `model.n_latents`.
        max_new_tokens: longest answer; None: the default of the mode.
        temperature: 0 is greedy; above 0 the draws depend on `seed` and the problem's place only.
        batch_size: problems at once, halved when memory runs out.
        advance: called with the number of answers just made.

    Returns:
        One row per problem x condition, in the order of conditions and problems: mode, n_latents (-1 outside mode
        "latent"), prompt_id, cluster, operation, n_steps, answer, text, prediction (NaN: none), correct, parsed.
    """
    if not problems:
        raise ValueError("evaluate needs at least one problem, got none")
    counts = sorted(set(range(model.n_latents + 1) if latents is None else latents))
    conditions: list[tuple[AnswerMode, int]] = []
    for mode in dict.fromkeys(modes):
        conditions += [("latent", k) for k in counts] if mode == "latent" else [(mode, -1)]
    texts: dict[tuple[AnswerMode, int], list[str]] = {condition: [""] * len(problems) for condition in conditions}

    size = batch_size
    for mode in dict.fromkeys(modes):
        limit = default_new_tokens(model, mode) if max_new_tokens is None else max_new_tokens
        uniforms = None
        if temperature > 0:
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(len(problems), limit, generator=generator, dtype=torch.float64)
        order = sorted(range(len(problems)), key=lambda i: -len(problems[i].question))  # the largest batch first
        start = 0
        while start < len(order):
            rows = order[start : start + size]
            drawn = None if uniforms is None else uniforms[rows]
            try:
                found = _answer(model, [problems[i].question for i in rows], mode, counts, limit, temperature, drawn)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise ValueError("one problem does not fit into memory: use a smaller dtype or the CPU") from None
                size = (size + 1) // 2
                torch.cuda.empty_cache()
                continue
            for condition, answers in found.items():
                for i, text in zip(rows, answers, strict=True):
                    texts[condition][i] = text
                advance(len(rows))
            start += len(rows)

    frames = []
    for (mode, count), answers in texts.items():
        frames.append(
            pd.DataFrame(
                {
                    "mode": mode,
                    "n_latents": count,
                    "prompt_id": [problem.prompt_id for problem in problems],
                    "cluster": [problem.cluster or problem.prompt_id for problem in problems],
                    "operation": [problem.operation for problem in problems],
                    "n_steps": [len(problem.steps) for problem in problems],
                    "answer": [problem.answer for problem in problems],
                    **judged(answers, [problem.answer for problem in problems], reading_of(problems)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _answer(
    model: CodiModel,
    questions: list[str],
    mode: AnswerMode,
    counts: Sequence[int],
    limit: int,
    temperature: float,
    uniforms: torch.Tensor | None,
) -> dict[tuple[AnswerMode, int], list[str]]:
    """Answers of one batch under all conditions of one mode."""
    prompt = model.prefill(model.encode(questions, thought=mode), keep=())
    if mode != "latent":
        return {(mode, -1): decode_answers(model, prompt, limit, temperature, uniforms=uniforms).texts}
    thought = model.rollout(prompt, max(counts), keep=("cache",))
    texts: dict[tuple[AnswerMode, int], list[str]] = {}
    for k in counts:
        texts[mode, k] = decode_answers(model, thought.truncate(k), limit, temperature, uniforms=uniforms).texts
    return texts
