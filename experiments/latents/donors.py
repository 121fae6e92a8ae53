"""Latents of other prompts, and how they are put into a rollout: as vectors, or as cache slots turned to their new
position; and Gaussian noise with the spread of donors.

A donor's *key* is what the answer depends on: step 1 and Z in problems (X±Y)·Z + (X±Y), every intermediate value in
others. Donors of the same key differ in wording only; those of another key differ in every value of it. Knows nothing
about which donor a study picks, or what becomes of the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from codi.rope import rotate, unrotate
from experiments.latents.patch.template import has_form
from experiments.study.thoughts import Thoughts, think
from experiments.tasks import STEPS_HELP, Problem
from experiments.tasks.split import Split
from steering.directions import generator
from steering.replacements import ReplaceRows

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Given", "Key", "Noise", "another_wording", "by_key", "check_known", "key_of", "latents_of",
           "other_keys", "put_in", "unlike"]  # fmt: skip

Key = tuple[float, ...]
"""Step 1 and Z; of problems of another form all intermediate values."""


def key_of(problem: Problem) -> Key:
    """What the answer depends on."""
    if has_form(problem):
        return problem.intermediates[0], problem.numbers[2]
    return problem.intermediates


def by_key(problems: Sequence[Problem]) -> dict[Key, list[int]]:
    """Key -> which problems have it."""
    pools: dict[Key, list[int]] = defaultdict(list)
    for row, problem in enumerate(problems):
        pools[key_of(problem)].append(row)
    return dict(pools)


def other_keys(keys: Sequence[Key], problem: Problem) -> list[Key]:
    """The keys that differ from the problem's in every value that both have, the answer (the last one) among them."""
    own = key_of(problem)

    def differs(key: Key) -> bool:
        both = min(len(key), len(own))  # problems of other numbers of steps are compared as far as both go
        return key[-1] != own[-1] and all(a != b for a, b in zip(key[:both], own[:both], strict=True))

    return [key for key in keys if differs(key)]


def unlike(problem: Problem, other: Problem) -> bool:
    """Whether another problem of as many steps differs in its answer and in everything that the answer depends on."""
    own, key = key_of(problem), key_of(other)
    long = len(problem.intermediates) == len(other.intermediates) and len(own) == len(key)
    return long and problem.answer != other.answer and all(a != b for a, b in zip(own, key, strict=True))


def another_wording(problem: Problem, other: Problem) -> bool:
    """Whether they are worded differently: by their templates, or their questions where these are not known."""
    if problem.template or other.template:
        return problem.template != other.template
    return problem.question != other.question


def check_known(study: str, prompts: Split, least: int = 1) -> None:
    """Refuse prompts without a key.

    Raises:
        ValueError: a prompt with fewer known steps than `least`.
    """
    lacking = [p for p in (*prompts.evaluation, *prompts.derivation) if len(p.intermediates) < least]
    if lacking:
        needs, has = f"{least} or more known steps" if least > 1 else "known steps", len(lacking[0].intermediates)
        raise ValueError(
            f"{study} needs prompts with {needs}, {lacking[0].prompt_id!r} has {has or 'none'}: {STEPS_HELP}"
        )


@dataclass(frozen=True)
class Given:
    """Latents that can be put into other rollouts.

    Attributes:
        embeddings: (row, latent, d_model) z_1..z_n.
        content: (row, latent, layer, …) keys of the cache slots without their position.
        values: (row, latent, layer, …).
    """

    embeddings: Tensor
    content: Tensor
    values: Tensor


def latents_of(model: CodiModel, known: Sequence[Thoughts], problems: Sequence[Problem], at_once: int = 128) -> Given:
    """The latents of thoughts that are there already, then of further problems, in this order.

    Args:
        model: the model.
        known: kept embeddings, keys and values.
        problems: rolled out here.
        at_once: problems per rollout.
    """
    kept = ("embeddings", "keys", "values")
    banks = [one.run for one in known]
    banks += [
        think(model, problems[start : start + at_once], keep=kept).run for start in range(0, len(problems), at_once)
    ]
    given = {name: torch.cat([getattr(run, name) for run in banks]) for name in kept}
    positions = torch.cat([run.latent_positions for run in banks])
    return Given(given["embeddings"], unrotate(given["keys"], positions[:, :, None, None], model), given["values"])


@dataclass(frozen=True)
class Noise:
    """Gaussian vectors with mean and spread of every coordinate of every latent.

    Attributes:
        mean, spread: (latent, d_model).
        drawn: (draw, latent, d_model) standard normal.
    """

    mean: Tensor
    spread: Tensor
    drawn: Tensor

    @classmethod
    def like(cls, embeddings: Tensor, draws: int, seed: int, study: str) -> Noise:
        """With the spread of some latents, (row, latent, d_model)."""
        mean, spread = embeddings.mean(0), embeddings.std(0, correction=0)
        drawn = [
            torch.from_numpy(generator(seed, study, "noise", draw).standard_normal(tuple(mean.shape)))
            for draw in range(draws)
        ]
        return cls(mean, spread, torch.stack(drawn).to(mean))

    def at(self, latent: int, draw: Tensor) -> Tensor:
        """(row, d_model) vectors of one latent; draw (row,)."""
        k = latent - 1
        return self.mean[k] + self.spread[k] * self.drawn[draw.to(self.drawn.device), k]


def put_in(
    model: CodiModel,
    given: Given,
    noise: Noise,
    *,
    donor: Tensor,
    draw: Tensor,
    vector: Tensor,
    slot: Tensor,
    noisy: Tensor,
    first: Tensor,
) -> ReplaceRows:
    """The intervention that puts latents into the rows of one batch.

    Args:
        model: the model.
        given: latents that are put in.
        noise: vectors in place of a donor's.
        donor: (row,) row of `given`; any where none is needed.
        draw: (row,) draw of the noise; any where none is needed.
        vector, slot: (row, latent) bool, whether z (the slot) of this latent is replaced.
        noisy: (row,) bool, whether the vectors are noise.
        first: (row,) position of latent 1.
    """
    values: dict[Any, Any] = {}
    source, random = donor.to(model.device), noisy.to(model.device)[:, None]
    for k in range(1, vector.shape[1] + 1):
        wanted = torch.where(random, noise.at(k, draw), given.embeddings[source, k - 1])
        values["embedding", k, 0] = (vector[:, k - 1], wanted)
        turn = (first + k - 1)[:, None]
        for layer in range(1, model.n_layers + 1):
            turned = rotate(given.content[source, k - 1, layer - 1], turn, model)
            values["keys", k, layer] = (slot[:, k - 1], turned)
            values["values", k, layer] = (slot[:, k - 1], given.values[source, k - 1, layer - 1])
    return ReplaceRows(values)
