"""Mean patching: z_k becomes the mean latent of other prompts, zero or noise.

Other prompts are derivation prompts with the same key, with another one, or all of them; noise comes in the three
published random forms ("coordinate": Gaussian per coordinate over prompts; "scalar": Gaussian with mean and spread over
the coordinates of the mean latent; "norm": a random direction with the norm of the prompt's own latent). Later latents
are computed on the edited past. Only prompts whose key has a derivation prompt are asked.

Knows nothing about files, tables or claims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from experiments.latents.donors import Key, key_of, other_keys
from experiments.statistics.effects import Selector
from experiments.study.answers import answer_table, set_of, trial_schema
from experiments.study.parts import Workbench
from experiments.study.thoughts import Bank, derivation_bank, evaluation_thoughts
from experiments.tasks import Problem
from steering.directions import generator
from steering.replacements import replace_embeddings

__all__ = ["BY", "KINDS", "MEANS", "RANDOM_FORMS", "UNEDITED", "mean_patching", "replaced"]

RANDOM_FORMS = ("coordinate", "scalar", "norm")
KINDS = ("same key", "other key", "mean", "zero", *RANDOM_FORMS)

MEANS = trial_schema(
    kind=pa.string(), replaced=pa.int32(), draw=pa.int32(), donor_answer=pa.float64(), donor=pa.bool_()
)
"""kind: one of KINDS, or "none" for the unedited run; replaced: the set of latents; draw: of the random forms;
donor_answer: of a prompt with the other key; donor: whether that is the answer given."""
BY = ("kind", "replaced")
UNEDITED: Selector = {"kind": "none", "replaced": 0}

_Place = tuple[str, int] | Key


def replaced(kind: str, latents: Sequence[int]) -> Selector:
    """Answers with these latents replaced."""
    return {"kind": kind, "replaced": set_of(latents)}


def mean_patching(
    bench: Workbench, *, draws: int, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of mean patching, see `MEANS`."""
    n = bench.model.n_latents
    thoughts, bank = bench.once(evaluation_thoughts), bench.once(derivation_bank)
    assert thoughts.run.embeddings is not None
    norms = thoughts.run.embeddings.float().norm(dim=-1).cpu()  # (prompt, latent)
    groups: dict[Key, list[int]] = defaultdict(list)
    for row, problem in enumerate(bank.problems):
        groups[key_of(problem)].append(row)
    chosen = [i for i, problem in enumerate(thoughts.problems) if key_of(problem) in groups]
    if len(chosen) < 2:
        raise ValueError(
            "fewer than 2 evaluation prompts share their key (template problems: step 1 and Z, others: all values) "
            "with a derivation prompt: use more prompts, or shorter problems"
        )
    table, place = _vectors(bank, groups, draws, seed)
    keys = sorted(groups)
    rng = generator(seed, "patch", "means")
    tried: list[tuple[str, int]] = [("none", -1)]
    tried += [(kind, -1) for kind in KINDS if kind not in RANDOM_FORMS]
    tried += [(form, draw) for form in RANDOM_FORMS for draw in range(draws)]
    sets = [tuple(range(1, n + 1)), *((k,) for k in range(1, n + 1))]

    columns: dict[str, list[Any]] = defaultdict(list)
    prompt: list[int] = []
    direction: list[list[int]] = []
    scale: list[list[float]] = []
    for i in chosen:
        own = key_of(thoughts.problems[i])
        other = _other_key(thoughts.problems[i], keys, rng)
        donor = bank.problems[groups[other][0]]
        for kind, draw in tried:
            vector = place[{"same key": own, "other key": other}.get(kind, (kind, draw))] if kind != "none" else -1
            for hit in sets if kind != "none" else [()]:
                prompt.append(i)
                direction.append([vector * n + k - 1 if k in hit else -1 for k in range(1, n + 1)])
                scale.append([float(norms[i, k - 1]) if kind == "norm" else 1.0 for k in range(1, n + 1)])
                columns["kind"].append(kind)
                columns["replaced"].append(set_of(hit))
                columns["draw"].append(draw)
                columns["donor_answer"].append(float(donor.answer))
    rows = torch.tensor(prompt)
    answers = replace_embeddings(
        bench.model,
        thoughts.run,
        table.flatten(0, 1),
        rows,
        torch.arange(1, n + 1).expand(len(rows), n),
        torch.tensor(direction),
        torch.tensor(scale),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    frame = answer_table(thoughts.problems, rows, answers.texts, **columns)
    return frame.assign(donor=frame["prediction"] == frame["donor_answer"])


def _other_key(problem: Problem, keys: Sequence[Key], rng: np.random.Generator) -> Key:
    """A key of which every number differs from the prompt's, of as many steps if there is one; its own where there is
    none."""
    own = key_of(problem)
    others = other_keys(keys, problem)
    others = [key for key in others if len(key) == len(own)] or others
    return others[int(rng.choice(len(others)))] if others else own


def _vectors(
    bank: Bank, groups: Mapping[Key, Sequence[int]], draws: int, seed: int
) -> tuple[Tensor, dict[_Place, int]]:
    """(vector, latent, d_model) that are put in, and where they are: by key, or by kind and draw."""
    mean = bank.embeddings.double().mean(0)
    spread = bank.embeddings.double().std(0, correction=0)
    found: dict[_Place, Tensor] = {("mean", -1): mean, ("zero", -1): torch.zeros_like(mean)}
    for key in sorted(groups):
        found[key] = bank.embeddings[list(groups[key])].double().mean(0)
    for form in RANDOM_FORMS:
        for draw in range(draws):
            noise = torch.from_numpy(generator(seed, "patch", form, draw).standard_normal(tuple(mean.shape)))
            if form == "coordinate":
                noise = mean + spread * noise
            elif form == "scalar":
                noise = mean.mean(1, keepdim=True) + mean.std(1, keepdim=True) * noise
            else:
                noise = noise / noise.norm(dim=1, keepdim=True)
            found[form, draw] = noise
    return torch.stack(list(found.values())).float(), {name: row for row, name in enumerate(found)}
