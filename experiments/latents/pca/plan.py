"""What `codi pca` does, with everything resolved: plain values, from options, model and prompts.

Knows nothing about how it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.latents.options import PcaOptions
from experiments.statistics.clusters import Settings
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    n_latents: int
    n_layers: int
    draws: int
    top: int
    steered: int
    where_pairs: int
    where_prompts: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings

    @property
    def latents(self) -> range:
        """All of them."""
        return range(1, self.n_latents + 1)


def make_plan(options: PcaOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: a model with fewer latents than can be told apart.
    """
    if model.n_latents < 3:
        raise ValueError(f"pca needs a model with at least 3 latents, got {model.n_latents}")
    return Plan(
        n_latents=model.n_latents,
        n_layers=model.n_layers,
        draws=options.draws,
        top=options.top,
        steered=options.steered,
        where_pairs=options.where_pairs,
        where_prompts=options.where_prompts,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
    )
