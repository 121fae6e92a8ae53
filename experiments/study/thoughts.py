"""What the latents of many prompts are without any intervention: rollouts, states, means.

`rollouts` halves the prompts where memory does not suffice; everything else stands on it or on one rollout. The last
three functions are for a `Workbench`, which computes each of them once per process:

    means = bench.once(derivation_means)
    thoughts = bench.once(evaluation_thoughts, ("embeddings", "cache"))

Knows nothing about files, options or answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codi import LatentRollout, Prefill
from experiments.study.parts import Workbench
from experiments.tasks import Problem
from steering.directions import generator
from steering.means import ControlDraws, DrawsAccumulator, LatentMeans, LatentMeansAccumulator

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = [
    "Bank",
    "Thoughts",
    "collect_means",
    "derivation_bank",
    "derivation_means",
    "evaluation_thoughts",
    "rollouts",
    "think",
]

EVERYTHING = ("embeddings", "hidden_states", "keys", "values", "cache")


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
    keep: Sequence[str] = EVERYTHING,
) -> Thoughts:
    """Compute prompts and their unedited latents.

    Args:
        model: the model.
        problems: the prompts.
        keep: what the rollout keeps, see `CodiModel.rollout`.
    """
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


# --- Means ------------------------------------------------------------------------------------------------------------


def collect_means(
    model: CodiModel,
    problems: Sequence[Problem],
    *,
    metadata: Mapping[str, str],
    n_draws: int = 0,
    seed: int = 0,
    keys: str = "content",
    batch_size: int = 32,
) -> tuple[LatentMeans, ControlDraws | None]:
    """Means over the latents of some prompts, and the raw draws of two controls if `n_draws` is above 0.

    The split halves are made of whole clusters, in a seeded order.
    """
    accumulator = LatentMeansAccumulator(model)
    collector = DrawsAccumulator(model, n_draws, seed, keys) if n_draws else None
    clusters = sorted({problem.cluster for problem in problems})
    order = generator(seed, "halves").permutation(len(clusters))
    half = {cluster: int(order[place]) % 2 for place, cluster in enumerate(clusters)}
    for start in range(0, len(problems), batch_size):
        chunk = problems[start : start + batch_size]
        for run, members in rollouts(model, chunk, model.n_latents, ("embeddings", "hidden_states", "keys", "values")):
            accumulator.update(run, [half[problem.cluster] for problem in members])
            if collector is not None:
                collector.update(run)
    return accumulator.finish(metadata), collector.finish() if collector is not None else None


def rollouts(
    model: CodiModel, problems: Sequence[Problem], n_latents: int, keep: Collection[str]
) -> Iterator[tuple[LatentRollout, Sequence[Problem]]]:
    """The rollout of all problems at once, or in halves of halves where memory does not suffice."""
    try:
        run = model.rollout(model.encode([problem.question for problem in problems]), n_latents, keep=keep)
    except RuntimeError as error:
        if not _out_of_memory(error) or len(problems) == 1:
            raise
        run = None
    if run is not None:
        yield run, problems
        return
    middle = len(problems) // 2
    yield from rollouts(model, problems[:middle], n_latents, keep)
    yield from rollouts(model, problems[middle:], n_latents, keep)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or ("memory" in str(error) and "alloc" in str(error))


# --- Shared by the parts of a study -----------------------------------------------------------------------------------


def derivation_means(bench: Workbench) -> LatentMeans:
    """Means over the latents of the derivation prompts."""
    return collect_means(bench.model, bench.prompts.derivation, metadata={})[0]


def derivation_bank(bench: Workbench) -> Bank:
    """The latents of the derivation prompts."""
    return Bank.collect(bench.model, bench.prompts.derivation)


def evaluation_thoughts(bench: Workbench, keep: tuple[str, ...] = EVERYTHING) -> Thoughts:
    """The evaluation prompts and their unedited latents."""
    return think(bench.model, bench.prompts.evaluation, keep)
