"""What `codi patch` does, with everything resolved: plain values, from options, model and prompts.

Knows nothing about how it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.latents.donors import check_known
from experiments.latents.options import PatchOptions
from experiments.latents.patch.interchange import Mixed, mixed_of
from experiments.latents.patch.template import has_form
from experiments.latents.patch.values import patched_latents, patched_steps, scopes_of
from experiments.statistics.clusters import Settings
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        form: all prompts are (X±Y)·Z + (X±Y): local predictions and claim C5 are about these alone.
        steps: steps before the last, which values are patched and predictions read for.
        scopes: of value patching.
    """

    n_latents: int
    n_layers: int
    families: tuple[str, ...]
    task: str
    form: bool
    steps: tuple[int, ...]
    scopes: tuple[str, ...]
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

    @property
    def mixed(self) -> tuple[Mixed, ...]:
        """Mixed predictions of interchange."""
        return mixed_of(self.steps, self.form)


def make_plan(options: PatchOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: prompts without two known steps.
    """
    check_known("patching", prompts, 2)
    everyone = (*prompts.evaluation, *prompts.derivation)
    return Plan(
        n_latents=model.n_latents,
        n_layers=model.n_layers,
        families=options.families,
        task=options.task,
        form=all(map(has_form, everyone)),
        steps=patched_steps(prompts.evaluation, options.legacy),
        scopes=scopes_of(prompts.derivation),
        legacy=options.legacy,
        draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
    )
