"""Principal components of latents and cache entries: how much variance they hold, and what they are parallel to.

Components are taken over the latents of derivation prompts, of all latents together ("pooled") and of each one: of z,
h, content keys, raw keys, values, and keys and values together ("kv"). Four trial tables: `variance` (share of each
component), `alignment` (share of the steering directions A−B in the pooled ones, beside random directions),
`token_alignment` (cosine with the end-of-thought embedding, beside every other token's) and `scores` (of the evaluation
prompts' latents on the first two).

Knows nothing about files, statistics or claims.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from experiments.study.parts import Workbench
from experiments.study.thoughts import derivation_means
from experiments.tasks import Problem
from steering.directions import difference
from steering.means import content_keys

if TYPE_CHECKING:
    from codi import CodiModel
    from steering.means import LatentMeans

__all__ = [
    "ALIGNMENT",
    "QUANTITIES",
    "SCORES",
    "TOKEN_ALIGNMENT",
    "VARIANCE",
    "Components",
    "alignment",
    "pooled_components",
    "principal_components",
    "scores",
    "token_alignment",
    "variance",
]

QUANTITIES = ("z", "h", "keys", "raw keys", "values", "kv")

VARIANCE = pa.schema({"quantity": pa.string(), "latent": pa.int16(), "component": pa.int32(), "share": pa.float64()})
"""latent: 0 for the components of all latents together; component: from 1; share of the total variance."""
ALIGNMENT = pa.schema(
    {"quantity": pa.string(), "source": pa.int16(), "target": pa.int16(), "first": pa.float64(),
     "first_two": pa.float64(), "all_kept": pa.float64(), "random_first_two": pa.float64(),
     "random_all_kept": pa.float64()}
)  # fmt: skip
"""first: |cosine| with the first pooled component; others: shares of the squared length of A−B, and what a random
direction has on average."""
TOKEN_ALIGNMENT = pa.schema(
    {"quantity": pa.string(), "component": pa.int32(), "embedding": pa.string(), "cosine": pa.float64(),
     "rank": pa.int64(), "tokens": pa.int64(), "p": pa.float64()}
)  # fmt: skip
"""embedding: "plain", or "centred" at the mean over tokens; rank of the end-of-thought token by |cosine| from the
largest."""
SCORES = pa.schema(
    {"quantity": pa.string(), "latent": pa.int16(), "prompt_id": pa.string(), "cluster": pa.string(),
     "first": pa.float64(), "second": pa.float64()}
)  # fmt: skip


# --- Components -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """Principal components of some rows.

    Attributes:
        mean: (feature,).
        vectors: (component, feature), orthonormal, largest variance first; each one's largest coordinate is positive.
        variances: (component,) of the scores.
        total: variance over all components together.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor
    total: float

    @property
    def shares(self) -> Tensor:
        """(component,) share of the total variance; 0 where there is none at all."""
        return self.variances / self.total if self.total > 0 else torch.zeros_like(self.variances)

    def scores(self, x: Tensor, number: int) -> Tensor:
        """Scores (…, number) of rows (…, feature) on the first components."""
        return (x.double() - self.mean) @ self.vectors[:number].T


def principal_components(x: Tensor, number: int) -> Components:
    """The first principal components of rows (row, feature), in float64; fewer if the rows have not that many."""
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"principal components need at least 2 rows (row, feature), got {tuple(x.shape)}")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    number = min(number, len(x) - 1, x.shape[1])
    if x.shape[0] < x.shape[1]:
        values, left = torch.linalg.eigh(centred @ centred.T)
        vectors = centred.T @ left
        vectors = vectors / vectors.norm(dim=0).clamp_min(1e-300)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(1)[:, :number].T.contiguous()
    variances = values.flip(0)[:number].clamp_min(0) / (len(x) - 1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return Components(mean, vectors * largest.sign(), variances, float(centred.square().sum() / (len(x) - 1)))


def _quantities(model: CodiModel, problems: Sequence[Problem], batch_size: int) -> dict[str, Tensor]:
    """name -> (prompt, latent, feature) float32 on the CPU; h at latent k is h_{k-1}, which z_k is projected from."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(problems), batch_size):
        chunk = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(chunk), model.n_latents, keep=("embeddings", "keys", "values"))
        assert run.embeddings is not None and run.keys is not None and run.values is not None
        content = content_keys(run, model).float().flatten(2)
        values = run.values.float().flatten(2)
        for name, tensor in (
            ("z", run.embeddings.float()), ("h", run.states[:, :-1].float()), ("keys", content),
            ("raw keys", run.keys.float().flatten(2)), ("values", values), ("kv", torch.cat((content, values), -1)),
        ):  # fmt: skip
            parts[name].append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def derivation_quantities(bench: Workbench, batch_size: int) -> dict[str, Tensor]:
    """`_quantities` of the derivation prompts."""
    return _quantities(bench.model, bench.prompts.derivation, batch_size)


def pooled_components(bench: Workbench, top: int, batch_size: int) -> dict[str, Components]:
    """Components over all latents of the derivation prompts, by quantity."""
    data = bench.once(derivation_quantities, batch_size)
    return {name: principal_components(x.flatten(0, 1), top) for name, x in data.items()}


# --- Parts ------------------------------------------------------------------------------------------------------------


def variance(bench: Workbench, *, top: int, batch_size: int, seed: int) -> pd.DataFrame:
    """Share of variance of every component, see `VARIANCE`."""
    pooled = bench.once(pooled_components, top, batch_size)
    rows = []
    for name, x in bench.once(derivation_quantities, batch_size).items():
        single = [principal_components(x[:, k], top) for k in range(x.shape[1])]
        for latent, components in enumerate((pooled[name], *single)):
            for i, share in enumerate(components.shares.tolist(), start=1):
                rows.append({"quantity": name, "latent": latent, "component": i, "share": share})
    return pd.DataFrame(rows, columns=VARIANCE.names)


def token_alignment(bench: Workbench, *, top: int, batch_size: int, seed: int) -> pd.DataFrame:
    """Cosine of the components of z and h with the end-of-thought embedding, see `TOKEN_ALIGNMENT`."""
    model = bench.model
    embedding = model.base.get_input_embeddings().weight.detach().double().cpu()
    pooled = bench.once(pooled_components, top, batch_size)
    rows: list[dict[str, Any]] = []
    for name in ("z", "h"):
        vectors = pooled[name].vectors
        cosines = {
            what: table @ vectors.T / table.norm(dim=1, keepdim=True).clamp_min(1e-12)
            for what, table in (("plain", embedding), ("centred", embedding - embedding.mean(0)))
        }
        for i in range(len(vectors)):
            for what, table in cosines.items():
                own = float(table[model.protocol.eot_id, i])
                rank = int((table[:, i].abs() >= abs(own) - 1e-12).sum())
                rows.append(
                    {"quantity": name, "component": i + 1, "embedding": what, "cosine": own, "rank": rank,
                     "tokens": len(table), "p": rank / len(table)}
                )  # fmt: skip
    return pd.DataFrame(rows, columns=TOKEN_ALIGNMENT.names)


def alignment(bench: Workbench, *, top: int, batch_size: int, seed: int) -> pd.DataFrame:
    """How much of the steering directions A−B lies in the components, see `ALIGNMENT`; no row where A−B is nothing."""
    means = bench.once(derivation_means)
    rows: list[dict[str, Any]] = []
    for name, components in bench.once(pooled_components, top, batch_size).items():
        for a, b in itertools.combinations(range(1, bench.model.n_latents + 1), 2):
            vector = _difference_of(means, name, a, b)
            length = float(vector.norm())
            if length == 0:
                continue
            cosine = components.vectors @ vector / length
            dimension = len(vector)
            rows.append(
                {"quantity": name, "source": a, "target": b, "first": float(cosine[0].abs()),
                 "first_two": float(cosine[:2].square().sum()), "all_kept": float(cosine.square().sum()),
                 "random_first_two": min(1.0, 2 / dimension), "random_all_kept": min(1.0, len(cosine) / dimension)}
            )  # fmt: skip
    return pd.DataFrame(rows, columns=ALIGNMENT.names)


def _difference_of(means: LatentMeans, name: str, a: int, b: int) -> Tensor:
    """Steering direction A−B of a quantity, flattened."""
    if name in ("z", "h"):
        vector = difference(means, a, b, "embedding" if name == "z" else "hidden").vector
        assert vector is not None
        return vector
    direction = difference(means, a, b, "kv", keys="raw" if name == "raw keys" else "content")
    assert direction.keys is not None and direction.values is not None
    keys, values = direction.keys.flatten(), direction.values.flatten()
    return {"keys": keys, "raw keys": keys, "values": values, "kv": torch.cat((keys, values))}[name]


def scores(bench: Workbench, *, top: int, batch_size: int, seed: int) -> pd.DataFrame:
    """Scores of the evaluation prompts' latents on the first two components, see `SCORES`; 0 on one that is not
    there."""
    problems = bench.prompts.evaluation
    held_out = _quantities(bench.model, problems, batch_size)
    frames = []
    for name, components in bench.once(pooled_components, top, batch_size).items():
        points = components.scores(held_out[name], 2)  # (prompt, latent, component)
        points = torch.nn.functional.pad(points, (0, 2 - points.shape[-1]))
        for latent in range(points.shape[1]):
            frames.append(
                pd.DataFrame({
                    "quantity": name, "latent": latent + 1,
                    "prompt_id": [problem.prompt_id for problem in problems],
                    "cluster": [problem.cluster or problem.prompt_id for problem in problems],
                    "first": points[:, latent, 0].numpy(), "second": points[:, latent, 1].numpy(),
                })
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)
