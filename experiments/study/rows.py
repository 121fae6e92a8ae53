"""Greedy answers of many edited rollouts, row by row: every row continues a computed prompt under edits of its own.

Knows nothing about what the edits are, or about conditions, files and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codi import Intervention, Prefill
from codi.decode import decode_answers

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Edits", "answer_rows"]

Edits = Callable[[Tensor], Sequence[Intervention]]
"""Row numbers of one batch -> interventions that see exactly these rows."""


def answer_rows(
    model: CodiModel,
    prefill: Prefill,
    prompt: Sequence[int] | Tensor,
    edits: Edits,
    *,
    n_latents: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 256,
) -> list[str]:
    """Greedy answers of many edited rollouts that start from computed prompts.

    Args:
        model: the model.
        prefill: computed prompts; not changed.
        prompt: (row,) which prompt a row continues.
        edits: interventions for a batch of rows; rollout and answer both see them.
        n_latents: latents; None: as many as the model was trained with.
        max_new_tokens, batch_size: of the decoding.
    """
    rows = torch.as_tensor(prompt, dtype=torch.long)
    number = model.n_latents if n_latents is None else n_latents
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        here = torch.arange(start, min(start + batch_size, len(rows)))
        interventions = list(edits(here))
        run = model.rollout(prefill.select(rows[here]), number, interventions, keep=("cache",))
        texts += decode_answers(model, run, max_new_tokens, interventions=interventions).texts
    return texts
