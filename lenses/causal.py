"""Are the directions that a lens reads the ones the model uses? Causal basis extraction, and the ablation to check it.

Energy of a unit direction v at (position, layer), over states x:

    energy(v) = mean of KL(lens(x) ‖ lens(x with v mean-ablated)),      x − v vᵀ(x − mean x)

`causal_basis` finds orthonormal v_1, v_2, … that maximise it greedily, each orthogonal to those before.
`AblateDirections` then does the same ablation inside the model; if the lens reads what the model uses, high-energy
directions move the model's output more than random ones do.

tuned_lens has an extraction of its own; version 0.2.0 cannot start it from a tuned lens (it sends the unembedding
matrix through the translator the wrong way round), so the greedy search is written here, with the same objective.

Knows nothing about prompts or how effects are judged.

Source: Belrose et al. 2023, arXiv 2303.08112, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codi.interventions import Intervention
from lenses.latent_lens import LatentLens

__all__ = ["AblateDirections", "CausalBasis", "causal_basis", "energies", "mean_ablated"]


def mean_ablated(x: Tensor, directions: Tensor, mean: Tensor) -> Tensor:
    """States with directions set to their mean: x − V Vᵀ (x − mean).

    Args:
        x: (…, d_model).
        directions: (d_model,) or orthonormal rows (direction, d_model).
        mean: (d_model,).
    """
    rows = directions.reshape(-1, directions.shape[-1])
    return x - (x - mean) @ rows.T @ rows


@dataclass(frozen=True)
class CausalBasis:
    """Orthonormal directions (direction, d_model) by falling energy, and their energies (direction,) in nats."""

    directions: Tensor
    energies: Tensor


def _energy(lens: LatentLens, x: Tensor, layer: int, position: int, log_p: Tensor, v: Tensor, mean: Tensor) -> Tensor:
    log_q = lens.logits(mean_ablated(x, v, mean), layer, position).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


@torch.no_grad()
def energies(lens: LatentLens, x: Tensor, layer: int, position: int, directions: Tensor) -> Tensor:
    """Energy (direction,) of each unit direction (direction, d_model), one at a time."""
    x = x.float()
    log_p = lens.logits(x, layer, position).log_softmax(dim=-1)
    return torch.stack([_energy(lens, x, layer, position, log_p, v, x.mean(dim=0)) for v in directions.float()])


def causal_basis(
    lens: LatentLens, x: Tensor, layer: int, position: int, n_directions: int, max_evaluations: int = 30
) -> CausalBasis:
    """Directions whose mean ablation changes what the lens says most.

    The search starts, for each direction, at the best of the remaining principal components of the states (those are
    the directions in which an ablation moves the states at all) and goes on with L-BFGS on the unit sphere.

    Args:
        lens: at `position`.
        x: (row, d_model) states of `layer`, at least 2.
        layer: 0..n_layers.
        position: of the states.
        n_directions: 1..d_model.
        max_evaluations: of the energy, per direction.

    Returns:
        Orthonormal directions with energies that do not increase.
    """
    x = x.detach().float()
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"a causal basis needs at least 2 states (row, d_model), got {tuple(x.shape)}")
    if not 1 <= n_directions <= x.shape[1]:
        raise ValueError(f"n_directions must be in 1..{x.shape[1]}, got {n_directions}")
    mean = x.mean(dim=0)
    with torch.no_grad():
        log_p = lens.logits(x, layer, position).log_softmax(dim=-1)
        components = torch.linalg.svd(x - mean, full_matrices=False).Vh[: 2 * n_directions + 8]
    found: list[Tensor] = []
    values: list[float] = []
    for _ in range(n_directions):
        before = torch.stack(found) if found else x.new_zeros(0, x.shape[1])

        def on_sphere(v: Tensor, before: Tensor = before) -> Tensor:
            v = v - v @ before.T @ before
            return v / v.norm().clamp(min=1e-12)

        with torch.no_grad():
            starts = torch.stack([on_sphere(component) for component in components])
            scores = [float(_energy(lens, x, layer, position, log_p, v, mean)) for v in starts]
        best, best_value = starts[int(torch.tensor(scores).argmax())], max(scores)
        v = best.clone().requires_grad_()
        search = torch.optim.LBFGS(
            [v], max_iter=max_evaluations, max_eval=max_evaluations, line_search_fn="strong_wolfe"
        )

        def loss(v: Tensor = v, search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()
            value = -_energy(lens, x, layer, position, log_p, on_sphere(v), mean)
            value.backward()
            return value

        search.step(loss)
        with torch.no_grad():
            moved = on_sphere(v.detach())
            value = float(_energy(lens, x, layer, position, log_p, moved, mean))
            if value > best_value:
                best, best_value = moved, value
            found.append(on_sphere(best))
            values.append(best_value)
    order = torch.tensor(values).argsort(descending=True)
    return CausalBasis(torch.stack(found)[order], torch.tensor(values)[order])


class AblateDirections(Intervention):
    """Mean-ablates directions of the residual stream at one latent and layer; every row may have its own direction.

    Args:
        latent: 1..n.
        layer: 0 (the embedding that is fed) or 1..n_layers − 1 (after that block, before the final norm).
        directions: (d_model,) the same for every row, (batch, d_model) one per row, or (batch, direction, d_model)
            orthonormal ones per row.
        mean: (d_model,) of the states there. For layer 0 of a model that adds position embeddings: mean of z.
    """

    def __init__(self, latent: int, layer: int, directions: Tensor, mean: Tensor) -> None:
        self.latent, self.layer, self.mean = latent, layer, mean
        self.directions = directions[:, None] if directions.dim() == 2 else directions

    def _ablate(self, x: Tensor) -> Tensor:
        away = x.float() - self.mean.float()
        v = self.directions.float()
        if v.dim() == 1:
            removed = (away @ v)[:, None] * v
        else:
            removed = torch.einsum("brd,br->bd", v, torch.einsum("brd,bd->br", v, away))
        return (x.float() - removed).to(x.dtype)

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self._ablate(z) if self.layer == 0 and k == self.latent else z

    def edit_layer(self, k: int, layer: int, x: Tensor) -> Tensor:
        return self._ablate(x) if self.layer == layer and k == self.latent else x
