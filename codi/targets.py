"""What a teacher that stays as it is gives for every training problem, found once before the student is trained.

A teacher with weight 0 in the loss is never asked for anything but the states that are matched and those before the
results of steps. If it is the model as it is before distillation begins, and problems come again, they can be kept:
(n_layers + 1 + steps) · d_model numbers per problem, and no step of training runs a written chain.

Knows nothing about tasks, files or how problems are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codi.batches import Example, TrainingBatch, collate
from codi.parts import Parts
from codi.rollout import prefill
from codi.training import teacher_states

__all__ = ["Targets", "find_targets"]


@dataclass(frozen=True)
class Targets:
    """Targets of some problems.

    Attributes:
        target: (problem, layer, d_model) states to be matched.
        steps: (problem, step, d_model) last states before the result of each step; zeros where there is no step.
        rows: name of a problem -> its row.
    """

    target: Tensor
    steps: Tensor
    rows: Mapping[str, int]

    def put(self, batch: TrainingBatch, names: Sequence[str]) -> TrainingBatch:
        """The batch with the targets of its problems, on its device.

        Args:
            batch: of `collate`.
            names: of its problems, in order.

        Raises:
            KeyError: a problem without targets.
        """
        index = torch.tensor([self.rows[name] for name in names])
        device = batch.verbal.device
        return replace(batch, target=self.target[index].to(device), step_states=self.steps[index].to(device))

    def tensors(self) -> dict[str, Tensor]:
        """For a file; `Targets(**tensors, rows=…)` is the way back."""
        return {"target": self.target, "steps": self.steps}


@torch.no_grad()
def find_targets(
    model: Parts, problems: Sequence[Example], names: Sequence[str], batch_size: int, dtype: torch.dtype
) -> Targets:
    """Ask the model, as it is now, for the targets of problems.

    Args:
        model: the teacher.
        problems: at least one.
        names: one for each, all different.
        batch_size: problems computed at once, of similar length.
        dtype: of what is kept.
    """
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question) + len(problems[i].chain))
    target = torch.zeros(len(problems), model.n_layers + 1, model.d_model, dtype=dtype)
    steps = torch.zeros(len(problems), 1, model.d_model, dtype=dtype)
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        batch = collate([problems[i] for i in part], model).to(model.device)
        rows = torch.arange(len(part), device=model.device)
        _, found, before = teacher_states(model, prefill(model, batch.prefix, keep=()), batch, rows)
        before = before * (batch.step_read >= 0)[..., None]
        wider = before.shape[1] - steps.shape[1]
        if wider > 0:
            steps = torch.nn.functional.pad(steps, (0, 0, 0, wider))
        target[part] = found.to("cpu", dtype)
        steps[torch.tensor(part)[:, None], torch.arange(before.shape[1])] = before.to("cpu", dtype)
    return Targets(target, steps, {name: row for row, name in enumerate(names)})
