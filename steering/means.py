"""Per-latent means of what a CODI model computes, accumulated in float64 batch by batch.

Two fitters: `LatentMeansAccumulator` (means, spread and their split halves) and `DrawsAccumulator` (raw material of the
covariance-matched and shuffled controls). Both see each rollout once and end in a small frozen result.

Knows nothing about prompts, answers or where the numbers are used; `steering.directions` takes differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from codi import CodiModel, LatentRollout
from codi.rope import unrotate
from lm.terms import KEY_FRAMES

__all__ = ["ControlDraws", "DrawsAccumulator", "LatentMeans", "LatentMeansAccumulator", "content_keys"]


def content_keys(run: LatentRollout, model: CodiModel) -> Tensor:
    """Latent keys with their rotary rotation undone, as if every slot stood at position 0.

    Args:
        run: a rollout that kept its keys.
        model: the model that made it.

    Returns:
        (batch, latent, layer, kv_head, d_head) float64; equal to run.keys for models with absolute positions (GPT-2).
    """
    if run.keys is None:
        raise ValueError("the run must have kept its keys: rollout(..., keep=(..., 'keys'))")
    return unrotate(run.keys.double(), run.latent_positions[:, :, None, None], model)


@dataclass(frozen=True)
class LatentMeans:
    """Means over prompts of every latent quantity, kept per split half.

    Attributes:
        halves: name -> (half, …) float64 means over the prompts of each half. Names: embeddings (half, latent,
            d_model), hidden_states (half, latent, layer, d_model), states (half, latent 0..n, d_model), keys_content,
            keys_raw, values (half, latent, layer, kv_head, d_head), and of the squares: embeddings_square,
            states_square.
        counts: prompts in each half.
        metadata: what they were computed from; saved beside them.
    """

    halves: Mapping[str, Tensor]
    counts: tuple[int, int]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> Tensor:
        """Mean over all prompts of one quantity (see `halves` for the names); float64."""
        if name not in self.halves:
            raise ValueError(f"no mean of {name!r} was kept; known: {', '.join(sorted(self.halves))}")
        weights = torch.tensor(self.counts, dtype=torch.float64) / sum(self.counts)
        both = self.halves[name]
        # an empty half holds zeros and weighs nothing
        return both[0] * weights[0] + both[1] * weights[1]

    @property
    def count(self) -> int:
        """Number of prompts."""
        return sum(self.counts)

    @property
    def n_latents(self) -> int:
        """Number of latents that were averaged."""
        return self.halves["embeddings"].shape[1]

    @property
    def embeddings(self) -> Tensor:
        """Means of z_1..z_n: (latent, d_model)."""
        return self.mean("embeddings")

    @property
    def hidden_states(self) -> Tensor:
        """Means of the residual stream: (latent, layer 0..n_layers, d_model)."""
        return self.mean("hidden_states")

    @property
    def states(self) -> Tensor:
        """Means of h_0..h_n: (latent 0..n, d_model)."""
        return self.mean("states")

    @property
    def projected_states(self) -> Tensor:
        """Means of h_0..h_{n-1}, row k-1 = the state that latent k is projected from: (latent, d_model)."""
        return self.states[:-1]

    @property
    def values(self) -> Tensor:
        """Means of cached values: (latent, layer, kv_head, d_head)."""
        return self.mean("values")

    def keys(self, frame: str = "content") -> Tensor:
        """Means of cached keys: (latent, layer, kv_head, d_head).

        Args:
            frame: "content" (un-rotated to position 0 before averaging) or "raw" (as cached).
        """
        if frame not in KEY_FRAMES:
            raise ValueError(f"keys must be one of {', '.join(KEY_FRAMES)}, got {frame!r}")
        return self.mean(f"keys_{frame}")

    def standard_deviation(self, name: str) -> Tensor:
        """Standard deviation over prompts, per coordinate, of "embeddings" (latent 1..n, d_model) or "states" (latent
        0..n, d_model)."""
        return (self.mean(f"{name}_square") - self.mean(name) ** 2).clamp_min(0).sqrt()

    def _layered(self, both: Tensor, name: str) -> Tensor:
        """(half, latent, layer, features): embeddings get one layer, kv-heads are joined."""
        return both[:, :, None] if name == "embeddings" else both.flatten(3)

    def norms(self) -> dict[str, Tensor]:
        """Euclidean norm of the mean per latent and layer: name -> (latent, layer)."""
        return {
            name: self._layered(self.mean(name)[None], name)[0].norm(dim=-1)
            for name in ("embeddings", "hidden_states", "keys_content", "keys_raw", "values")
        }

    def split_half_cosines(self, centred: bool = False) -> dict[str, Tensor]:
        """Cosine between the means of the two halves of the prompts, per latent and layer.

        Args:
            centred: subtract each half's mean over latents first. Differences A−B are made of what is left, so this is
                the stricter reading: plain means agree on their common offset even when their differences are noise.

        Returns:
            name -> (latent, layer), in -1..1; nan where a half is empty or a mean vanishes.
        """
        cosines = {}
        for name in ("embeddings", "hidden_states", "keys_content", "keys_raw", "values"):
            both = self._layered(self.halves[name], name)
            if centred:
                both = both - both.mean(dim=1, keepdim=True)
            lengths = both.norm(dim=-1)
            cosines[name] = (both[0] * both[1]).sum(-1) / (lengths[0] * lengths[1])
        return cosines

    def summary(self) -> list[dict[str, str | int | float]]:
        """One record per quantity, latent (1-based) and layer: norm, split-half cosine, the same centred.

        Layers of hidden_states are 0..n_layers (0 = what was fed), of keys and values 1..n_layers; embeddings have
        layer 0.
        """
        norms, plain, centred = self.norms(), self.split_half_cosines(), self.split_half_cosines(centred=True)
        records: list[dict[str, str | int | float]] = []
        for name, table in norms.items():
            first = 0 if name in ("embeddings", "hidden_states") else 1
            for latent in range(table.shape[0]):
                for layer in range(table.shape[1]):
                    records.append(
                        {
                            "quantity": name,
                            "latent": latent + 1,
                            "layer": layer + first,
                            "norm": float(table[latent, layer]),
                            "split_half_cosine": float(plain[name][latent, layer]),
                            "split_half_cosine_centred": float(centred[name][latent, layer]),
                        }
                    )
        return records

    def to_bytes(self) -> bytes:
        """As the content of a safetensors file, metadata in its header."""
        header = {**self.metadata, "counts": json.dumps(self.counts)}
        return save({name: tensor.contiguous() for name, tensor in self.halves.items()}, header)

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> LatentMeans:
        """Read what `save` wrote.

        Raises:
            ValueError: not a file of latent means, or damaged.
        """
        tensors, header = _read(path)
        if "counts" not in header or "embeddings" not in tensors:
            raise ValueError(f"{path} holds no latent means")
        first, second = json.loads(header.pop("counts"))
        return cls(tensors, (first, second), header)


class LatentMeansAccumulator:
    """Adds rollouts one batch at a time, in float64 on the CPU; `finish` freezes them.

    Args:
        model: the model whose rollouts are added (its rotary frequencies un-rotate the keys).
    """

    def __init__(self, model: CodiModel) -> None:
        self._model = model
        self._sums: dict[str, Tensor] = {}
        self._counts = [0, 0]

    def update(self, run: LatentRollout, halves: Sequence[int] | None = None) -> None:
        """Add every prompt of a rollout.

        Args:
            run: with embeddings, hidden states, keys and values kept.
            halves: 0 or 1 per prompt, the half it counts for (put prompts that share their numbers in one half);
                None: alternately, in the order of all updates.

        Raises:
            ValueError: a half that is not 0 or 1, or not one per prompt, or another number of latents than before.
        """
        batch = len(run)
        if halves is None:
            halves = [(sum(self._counts) + row) % 2 for row in range(batch)]
        if len(halves) != batch or not set(halves) <= {0, 1}:
            raise ValueError(f"halves must be 0 or 1 for each of {batch} prompts, got {list(halves)}")
        kept = _kept(run)
        quantities = {
            "embeddings": kept["embeddings"],
            "hidden_states": kept["hidden_states"],
            "states": run.states,
            "keys_content": content_keys(run, self._model),
            "keys_raw": kept["keys"],
            "values": kept["values"],
            "embeddings_square": kept["embeddings"].double() ** 2,
            "states_square": run.states.double() ** 2,
        }
        assignment = torch.tensor(list(halves))
        for name, value in quantities.items():
            value = value.detach().double().cpu()
            sums = self._sums.setdefault(name, torch.zeros((2, *value.shape[1:]), dtype=torch.float64))
            if sums.shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"{name} of earlier rollouts had shape {tuple(sums.shape[1:])}, got {tuple(value.shape[1:])}"
                )
            sums.index_add_(0, assignment, value)
        for half in halves:
            self._counts[half] += 1

    def finish(self, metadata: Mapping[str, str] | None = None) -> LatentMeans:
        """Freeze.

        Raises:
            ValueError: nothing was added.
        """
        if not sum(self._counts):
            raise ValueError("no rollout was added: means need at least one prompt")
        divisor = torch.tensor(self._counts, dtype=torch.float64).clamp_min(1)
        halves = {name: sums / divisor.reshape(2, *[1] * (sums.dim() - 1)) for name, sums in self._sums.items()}
        return LatentMeans(halves, (self._counts[0], self._counts[1]), dict(metadata or {}))


@dataclass(frozen=True)
class ControlDraws:
    """Raw draws for the covariance-matched and shuffled controls, before any norm matching.

    Attributes:
        covariance: name -> (draw, …) float32 samples of a zero-mean Gaussian with the covariance, over prompts and
            about each latent's own mean, of the collected latents. Names: embeddings, states (draw, d_model); keys,
            values (draw, layer, kv_head, d_head).
        shuffled: name -> (draw, latent, …) float32 means after the latent labels were permuted within every prompt.
        keys_frame: frame of the keys, "content" or "raw".
    """

    covariance: Mapping[str, Tensor]
    shuffled: Mapping[str, Tensor]
    keys_frame: str

    @property
    def n_draws(self) -> int:
        """Number of draws of each kind."""
        return self.covariance["embeddings"].shape[0]

    def to_bytes(self) -> bytes:
        """As the content of a safetensors file."""
        tensors = {f"covariance.{name}": t.contiguous() for name, t in self.covariance.items()}
        tensors |= {f"shuffled.{name}": t.contiguous() for name, t in self.shuffled.items()}
        return save(tensors, {"keys_frame": self.keys_frame})

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> ControlDraws:
        """Read what `save` wrote; ValueError if it is something else or damaged."""
        tensors, header = _read(path)
        if "keys_frame" not in header:
            raise ValueError(f"{path} holds no control draws")
        kinds: dict[str, dict[str, Tensor]] = {"covariance": {}, "shuffled": {}}
        for name, tensor in tensors.items():
            kind, _, quantity = name.partition(".")
            kinds[kind][quantity] = tensor
        return cls(kinds["covariance"], kinds["shuffled"], header["keys_frame"])


class DrawsAccumulator:
    """Streams rollouts into the raw draws of two controls, without keeping the rollouts.

    covariance draw = Σ_i Σ_k g_ik (x_ik − mean_k) / sqrt(N n) with standard normal g: a Gaussian whose covariance is
    exactly the empirical covariance of the latents about their own means, and no matrix is ever formed.
    shuffled draw   = means after permuting the latent labels within every prompt.

    Args:
        model: the model whose rollouts are added.
        n_draws: draws of each kind, at least 1.
        seed: of the Gaussians and permutations; they depend on (seed, index of the prompt) only, never on batch sizes.
        keys: frame of the keys, "content" or "raw".
    """

    def __init__(self, model: CodiModel, n_draws: int, seed: int = 0, keys: str = "content") -> None:
        if n_draws < 1:
            raise ValueError(f"the number of draws must be at least 1, got {n_draws}")
        if keys not in KEY_FRAMES:
            raise ValueError(f"keys must be one of {', '.join(KEY_FRAMES)}, got {keys!r}")
        self._model, self._n_draws, self._seed, self._keys = model, n_draws, seed, keys
        self._count = 0
        self._weighted: dict[str, Tensor] = {}  # Σ g x            (draw, …)
        self._shuffled: dict[str, Tensor] = {}  # Σ permuted x     (draw, latent, …)
        self._sums: dict[str, Tensor] = {}  # Σ x                  (latent, …)
        self._weights: Tensor | None = None  # Σ_i g               (draw, latent)

    def update(self, run: LatentRollout) -> None:
        """Add every prompt of a rollout (embeddings, hidden states, keys and values kept)."""
        kept = _kept(run)
        batch, n_latents = len(run), run.n_latents
        gaussians = np.empty((batch, self._n_draws, n_latents))
        orders = np.empty((batch, self._n_draws, n_latents), dtype=np.int64)
        for row in range(batch):
            rng = np.random.default_rng([self._seed, self._count + row])
            gaussians[row] = rng.standard_normal((self._n_draws, n_latents))
            orders[row] = rng.permuted(np.tile(np.arange(n_latents), (self._n_draws, 1)), axis=1)
        weights = torch.from_numpy(gaussians)
        picks = torch.nn.functional.one_hot(
            torch.from_numpy(orders), n_latents
        ).double()  # (batch, draw, label, latent)
        keys = content_keys(run, self._model) if self._keys == "content" else kept["keys"]
        quantities = {
            "embeddings": kept["embeddings"],
            "states": run.states[:, :-1],
            "keys": keys,
            "values": kept["values"],
        }
        for name, value in quantities.items():
            shape = value.shape[2:]
            flat = value.detach().double().cpu().flatten(2)  # (batch, latent, feature)
            weighted = torch.einsum("bdl,blf->df", weights, flat).reshape(self._n_draws, *shape)
            shuffled = torch.einsum("bdml,blf->dmf", picks, flat).reshape(self._n_draws, n_latents, *shape)
            sums = flat.sum(0).reshape(n_latents, *shape)
            for store, new in ((self._weighted, weighted), (self._shuffled, shuffled), (self._sums, sums)):
                store[name] = store[name] + new if name in store else new
        total = weights.sum(0)
        self._weights = total if self._weights is None else self._weights + total
        self._count += batch

    def finish(self) -> ControlDraws:
        """Freeze; ValueError if nothing was added."""
        if self._weights is None:
            raise ValueError("no rollout was added: draws need at least one prompt")
        covariance, shuffled = {}, {}
        scale = (self._count * self._weights.shape[1]) ** -0.5
        for name, weighted in self._weighted.items():
            mean = self._sums[name] / self._count
            offset = torch.einsum("dl,lf->df", self._weights, mean.flatten(1)).reshape(weighted.shape)
            covariance[name] = ((weighted - offset) * scale).float()
            shuffled[name] = (self._shuffled[name] / self._count).float()
        return ControlDraws(covariance, shuffled, self._keys)


def _kept(run: LatentRollout) -> dict[str, Tensor]:
    """What a mean needs of a run, checked to be there."""
    kept = {name: getattr(run, name) for name in ("embeddings", "hidden_states", "keys", "values")}
    missing = [name for name, value in kept.items() if value is None]
    if missing:
        raise ValueError(f"the run must have kept {', '.join(missing)}: rollout(..., keep=(…))")
    return kept


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a damaged file is a ValueError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
