"""Targets of a teacher that is frozen, in the run folder: found by the first process, read by all.

They are those of the model as it is when distillation begins, which is the same whenever a run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from codi.model import CodiModel
from codi.targets import Targets, find_targets
from experiments.tasks.problem import Problem
from experiments.train.data import text_of
from experiments.train.options import Resolved

__all__ = ["targets_of"]

FILE = "targets.safetensors"
AT_ONCE = 4
"""Micro-batches computed at once: without gradients there is room for more."""


def targets_of(model: CodiModel, config: Resolved, data: Sequence[Problem], accelerator: Accelerator) -> Targets:
    """Targets of all training problems; found and written by the main process if the run folder has none yet."""
    path = config.out / FILE
    names = [problem.prompt_id for problem in data]
    with accelerator.main_process_first():
        if not path.is_file():
            texts = [text_of(problem, model.protocol.answer_style, config.last_step) for problem in data]
            kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
            with accelerator.autocast():
                found = find_targets(model, texts, names, AT_ONCE * config.micro_batch, kind)
            partial = path.with_name(f"{FILE}.partial")
            save_file(found.tensors(), partial)
            partial.replace(path)
    return Targets(**load_file(path), rows={name: row for row, name in enumerate(names)})
