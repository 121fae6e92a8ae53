"""Steering directions between latents, and every direction that serves as their control.

Pure functions of means, raw draws and seeds. A `Direction` carries no coefficient: `steering.interventions` applies
those.

space       what is edited at latent k                        A−B is made of the means of
kv          keys and values of the cache slot of latent k     the slots of latents A and B, per layer and kv-head
embedding   z_k, the vector fed at latent k                   z_A and z_B
hidden      h_{k-1}, the state that z_k is projected from     h_{A-1} and h_{B-1}, the states that z_A and z_B come from

So in every space adding 1 × (A−B) at latent B moves the mean of what is edited there exactly to its mean at latent A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lm.terms import SPACES, KeyFrame, Space
from steering.means import ControlDraws, LatentMeans

__all__ = [
    "Direction",
    "Origin",
    "covariance_matched",
    "difference",
    "generator",
    "legacy_difference",
    "match_norms",
    "patch_coordinate",
    "patch_norm",
    "patch_scalar",
    "random_direction",
    "shuffled_difference",
    "typical",
]


@dataclass(frozen=True)
class Origin:
    """Where a direction comes from: it is of use for this model only.

    Attributes:
        model_hash: SHA-256 of the weight files; "" for a model that was not loaded from files.
        model_name: for messages.
        protocol: of the model, as JSON with sorted keys.
        source, target: latents A and B of A−B.
        n_prompts: prompts that the means are over.
        prompts_hash: SHA-256 over the prompts, in their order.
    """

    model_hash: str
    model_name: str
    protocol: str
    source: int
    target: int
    n_prompts: int
    prompts_hash: str = ""


@dataclass(frozen=True)
class Direction:
    """One direction in one space, float64, not normalised.

    Attributes:
        space: "kv", "embedding" or "hidden".
        keys, values: (layer, kv_head, d_head) each, in kv space; None elsewhere.
        vector: (d_model,) in embedding and hidden space; None in kv space.
        keys_frame: "content" (un-rotated; rotated to the edited slot when applied) or "raw" (added as it is).
        origin: where it comes from, if that is known; directions that are made of other tensors have none.
    """

    space: Space
    keys: Tensor | None = None
    values: Tensor | None = None
    vector: Tensor | None = None
    keys_frame: KeyFrame = "content"
    origin: Origin | None = None

    def __post_init__(self) -> None:
        kv = self.keys is not None and self.values is not None and self.vector is None
        plain = self.vector is not None and self.keys is None and self.values is None
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")
        if not (kv if self.space == "kv" else plain):
            needed = "keys and values" if self.space == "kv" else "a vector"
            raise ValueError(f"a direction in {self.space} space needs {needed}")

    def blocks(self) -> tuple[Tensor, ...]:
        """The tensors whose last axis is one norm-matched block: (keys, values) or (vector,)."""
        return tuple(block for block in (self.keys, self.values, self.vector) if block is not None)

    def with_blocks(self, blocks: Sequence[Tensor]) -> Direction:
        """The same kind of direction made of other tensors."""
        if self.space == "kv":
            return replace(self, keys=blocks[0], values=blocks[1], origin=None)
        return replace(self, vector=blocks[0], origin=None)

    def norm(self) -> float:
        """Euclidean norm over everything."""
        return float(torch.stack([block.double().square().sum() for block in self.blocks()]).sum().sqrt())

    def __neg__(self) -> Direction:
        return self.with_blocks([-block for block in self.blocks()])


def generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A random generator for one purpose: the same (seed, labels) give the same stream everywhere, in any order."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def _check_latents(n_latents: int, *latents: int) -> None:
    for latent in latents:
        if not 1 <= latent <= n_latents:
            raise ValueError(f"latent must be in 1..{n_latents}, got {latent}")


def _keep(n: int, chosen: Sequence[int] | None, name: str) -> Tensor:
    """(n,) 1.0 where chosen (1-based; None: everywhere)."""
    if chosen is None:
        return torch.ones(n, dtype=torch.float64)
    keep = torch.zeros(n, dtype=torch.float64)
    for index in chosen:
        if not 1 <= index <= n:
            raise ValueError(f"{name} must be in 1..{n}, got {index}")
        keep[index - 1] = 1.0
    return keep


def _between(
    space: Space,
    keys: Tensor,
    values: Tensor,
    vectors: Tensor,
    a: int,
    b: int,
    frame: KeyFrame,
    layers: Sequence[int] | None,
    kv_heads: Sequence[int] | None,
) -> Direction:
    """Row a − row b of per-latent quantities (latent first), outside the chosen layers and kv-heads zero."""
    if space != "kv":
        if layers is not None or kv_heads is not None:
            raise ValueError(f"layers and kv-heads can be chosen in kv space only, got {space} space")
        return Direction(space, vector=vectors[a - 1] - vectors[b - 1])
    n_layers, n_kv_heads = keys.shape[1:3]
    keep = _keep(n_layers, layers, "layer")[:, None, None] * _keep(n_kv_heads, kv_heads, "kv-head")[None, :, None]
    return Direction("kv", (keys[a - 1] - keys[b - 1]) * keep, (values[a - 1] - values[b - 1]) * keep, keys_frame=frame)


def difference(
    means: LatentMeans,
    a: int,
    b: int,
    space: Space,
    *,
    keys: KeyFrame = "content",
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
) -> Direction:
    """Steering direction A−B from latent `b` to latent `a`.

    direction = mean over prompts of what latent a holds  −  mean over prompts of what latent b holds   (module
    docstring).

    Args:
        means: per-latent means over the derivation prompts.
        a, b: latents, 1-based, different.
        space: "kv", "embedding" or "hidden".
        keys: "content" (means of un-rotated keys) or "raw" (means of keys as cached, the published way); kv space only.
        layers: layers 1..n_layers to edit (layer l writes hidden state l), None: all; kv space only.
        kv_heads: kv-heads 1..n_kv_heads to edit, None: all; kv space only.

    Returns:
        float64, not normalised: coefficient 1.0 adds one whole mean difference. difference(a, b) = −difference(b, a).

    Raises:
        ValueError: a latent, layer or kv-head out of range, a == b, or an unknown space.

    Source: Rimsky et al. 2023, arXiv 2312.06681 (mean difference); here between latents instead of prompts.
    """
    _check_latents(means.n_latents, a, b)
    if a == b:
        raise ValueError(f"A and B of a direction must differ, got {a} twice")
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    vectors = means.embeddings if space == "embedding" else means.projected_states
    return _between(space, means.keys(keys), means.values, vectors, a, b, keys, layers, kv_heads)


def legacy_difference(means: LatentMeans, a: int, b: int, space: Space) -> Direction:
    """Direction that the seed study's scripts add under the label "a-b": mean_b − mean_a.

    kv: raw keys and values. embedding: means of the last-layer states h_a and h_b, although it is added to an already
    projected vector. Both as published; `difference` is the corrected form.

    Raises:
        ValueError: as in `difference`, or hidden space, which the scripts do not have.
    """
    if space == "hidden":
        raise ValueError("legacy steering exists in kv and embedding space, got hidden")
    if space == "kv":
        return difference(means, b, a, "kv", keys="raw")
    _check_latents(means.n_latents, a, b)
    if a == b:
        raise ValueError(f"A and B of a direction must differ, got {a} twice")
    return Direction("embedding", vector=means.states[b] - means.states[a])


def match_norms(direction: Direction, like: Direction) -> Direction:
    """Rescale so that every block has the norm of the same block of `like`.

    A block is one layer × kv-head of the keys or of the values, or the whole vector in embedding and hidden space.
    Where `like` is zero (layers that are not edited) so is the result.

    Raises:
        ValueError: other shapes or space, or a block that is zero in `direction` but not in `like`.
    """
    if direction.space != like.space:
        raise ValueError(f"cannot match a direction in {direction.space} space to one in {like.space} space")
    matched = []
    for block, model in zip(direction.blocks(), like.blocks(), strict=True):
        if block.shape != model.shape:
            raise ValueError(f"cannot match a block of shape {tuple(block.shape)} to one of {tuple(model.shape)}")
        own, target = block.double().norm(dim=-1, keepdim=True), model.double().norm(dim=-1, keepdim=True)
        if bool(((own == 0) & (target > 0)).any()):
            raise ValueError("cannot rescale a zero block of a direction to a norm above zero")
        matched.append(block.double() * target / own.clamp_min(torch.finfo(torch.float64).tiny))
    return replace(like.with_blocks(matched), keys_frame=like.keys_frame)


def typical(directions: Sequence[Direction]) -> Direction:
    """A stand-in whose blocks have the mean norm that the blocks of `directions` have: what pooled draws are matched
    to.

    Its own orientation is arbitrary (the first coordinate); it is of use to `match_norms` only.
    """
    if not directions:
        raise ValueError("at least one direction is needed")
    blocks = []
    for parts in zip(*(direction.blocks() for direction in directions), strict=True):
        block = torch.zeros_like(parts[0], dtype=torch.float64)
        block[..., 0] = torch.stack([part.double().norm(dim=-1) for part in parts]).mean(0)
        blocks.append(block)
    return directions[0].with_blocks(blocks)


def random_direction(like: Direction, rng: np.random.Generator) -> Direction:
    """Gaussian direction, isotropic within each block, with the norms of `like` block by block (see `match_norms`)."""
    blocks = [torch.from_numpy(rng.standard_normal(tuple(block.shape))) for block in like.blocks()]
    return match_norms(like.with_blocks(blocks), like)


def _check_draw(draws: ControlDraws, draw: int, like: Direction) -> None:
    if not 0 <= draw < draws.n_draws:
        raise ValueError(f"draw must be in 0..{draws.n_draws - 1}, got {draw}")
    if like.space == "kv" and draws.keys_frame != like.keys_frame:
        raise ValueError(f"draws were made of {draws.keys_frame} keys, the direction of {like.keys_frame} keys")


def covariance_matched(draws: ControlDraws, draw: int, like: Direction) -> Direction:
    """Gaussian direction with the covariance that latents have over prompts, about each latent's own mean.

    It points where latents differ between prompts, as `random_direction` does not, and has the norms of `like` block by
    block.

    Args:
        draws: collected over the derivation prompts.
        draw: which one, 0-based.
        like: direction to match.
    """
    _check_draw(draws, draw, like)
    if like.space == "kv":
        raw = [draws.covariance["keys"][draw].double(), draws.covariance["values"][draw].double()]
    else:
        raw = [draws.covariance["embeddings" if like.space == "embedding" else "states"][draw].double()]
    return match_norms(like.with_blocks(raw), like)


def shuffled_difference(draws: ControlDraws, draw: int, a: int, b: int, like: Direction) -> Direction:
    """The mean difference A−B after the latent labels were permuted within every prompt, rescaled to the norms of
    `like`.

    Without the rescaling it would shrink with the number of prompts and control for nothing but its own small norm.

    Args:
        draws: collected over the derivation prompts.
        draw: which permutation, 0-based; one permutation serves all pairs, as one set of labels does.
        a, b: latents, 1-based, different.
        like: direction to match.
    """
    _check_draw(draws, draw, like)
    _check_latents(draws.shuffled["embeddings"].shape[1], a, b)
    if like.space == "kv":
        names = ["keys", "values"]
    else:
        names = ["embeddings" if like.space == "embedding" else "states"]
    rows = [draws.shuffled[name][draw].double() for name in names]
    return match_norms(like.with_blocks([row[a - 1] - row[b - 1] for row in rows]), like)


def _patched(means: LatentMeans, latent: int, space: Space) -> tuple[Tensor, Tensor]:
    """Mean and per-coordinate standard deviation of what a patch at this latent replaces."""
    _check_latents(means.n_latents, latent)
    if space == "embedding":
        return means.embeddings[latent - 1], means.standard_deviation("embeddings")[latent - 1]
    if space == "hidden":
        return means.projected_states[latent - 1], means.standard_deviation("states")[:-1][latent - 1]
    raise ValueError(f"random-latent patching replaces a vector: space must be embedding or hidden, got {space!r}")


def patch_scalar(means: LatentMeans, latent: int, space: Space, rng: np.random.Generator) -> Direction:
    """Random vector that replaces a latent, form (i): every coordinate ~ N(m, s²), m and s over the mean latent's
    coordinates.

    Source: Cywiński et al. (random-latent baseline).
    """
    mean, _ = _patched(means, latent, space)
    noise = torch.from_numpy(rng.standard_normal(mean.shape[0]))
    return Direction(space, vector=mean.mean() + mean.std() * noise)


def patch_coordinate(means: LatentMeans, latent: int, space: Space, rng: np.random.Generator) -> Direction:
    """Random vector that replaces a latent, form (ii): coordinate j ~ N(m_j, s_j²) over the collected latents at this
    position.

    Source: Cywiński et al. (random-latent baseline).
    """
    mean, deviation = _patched(means, latent, space)
    return Direction(space, vector=mean + deviation * torch.from_numpy(rng.standard_normal(mean.shape[0])))


def patch_norm(means: LatentMeans, latent: int, space: Space, rng: np.random.Generator) -> Direction:
    """Random vector that replaces a latent, form (iii): an isotropic unit vector; its coefficient is the prompt's own
    norm.

    Source: Cywiński et al. (random-latent baseline).
    """
    mean, _ = _patched(means, latent, space)
    noise = torch.from_numpy(rng.standard_normal(mean.shape[0]))
    return Direction(space, vector=noise / noise.norm())
