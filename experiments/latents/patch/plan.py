"""What `codi patch` does, with everything resolved: plain values, from options, model and prompts.

Knows nothing about how it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.latents.options import PatchOptions
from experiments.latents.patch.template import check_form
from experiments.latents.patch.values import patched_latents
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
    families: tuple[str, ...]
    task: str
    legacy: bool
    draws: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings

    @property
    def value_latents(self) -> tuple[int, ...]:
        """Latents of value patching."""
        return patched_latents(self.n_latents, self.legacy)


def make_plan(options: PatchOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: prompts of another form.
    """
    check_form(prompts)
    return Plan(
        n_latents=model.n_latents,
        n_layers=model.n_layers,
        families=options.families,
        task=options.task,
        legacy=options.legacy,
        draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
    )
