"""A loaded CODI model and what can be asked of it: encode, prefill, rollout, answer.

Built by `codi.load_codi`; knows nothing about files. Its parts are in parts.py, the latent loop in rollout.py, answers
in decode.py; none of these imports this module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from codi import decode
from codi import rollout as latent
from codi.interventions import Intervention
from codi.parts import Parts
from codi.rollout import KEEP, LatentRollout, Prefill
from lm.terms import AnswerMode
from lm.text import EncodedBatch

__all__ = ["CodiModel"]


class CodiModel(Parts):
    """Base model + projection + tokenizer + protocol (see `codi.parts.Parts`), and what can be asked of them.

    Attributes:
        interventions: what `prefill`, `rollout` and `answer` apply before those given; see `with_interventions`.
    """

    interventions: tuple[Intervention, ...] = ()

    @contextmanager
    def with_interventions(self, *interventions: Intervention) -> Iterator[None]:
        """While inside, prompts, rollouts and answers of this model undergo these interventions; afterwards, also after
        an error, the model is as before. Functions that start from a finished run do not see them."""
        before = self.interventions
        self.interventions = (*before, *interventions)
        try:
            yield
        finally:
            self.interventions = before

    @torch.no_grad()
    def prefill(
        self,
        batch: EncodedBatch,
        interventions: Sequence[Intervention] = (),
        keep: Collection[str] = ("hidden_states",),
    ) -> Prefill:
        """Compute the prompts once. See `codi.rollout.prefill`."""
        return latent.prefill(self, batch, (*self.interventions, *interventions), keep)

    @torch.no_grad()
    def rollout(
        self,
        source: EncodedBatch | Prefill | LatentRollout,
        n_latents: int = 6,
        interventions: Sequence[Intervention] = (),
        keep: Collection[str] = KEEP,
    ) -> LatentRollout:
        """Feed latents 1..n_latents, everything they compute in the open. See `codi.rollout.rollout`."""
        return latent.rollout(self, source, n_latents, (*self.interventions, *interventions), keep)

    def answer(
        self,
        texts: Sequence[str],
        n_latents: int | None = None,
        mode: AnswerMode = "latent",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        batch_size: int = 64,
        interventions: Sequence[Intervention] = (),
    ) -> list[str]:
        """Answer questions, in the order given. See `codi.decode.answer`."""
        return decode.answer(
            self,
            texts,
            n_latents=self.n_latents if n_latents is None else n_latents,
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            interventions=(*self.interventions, *interventions),
        )
