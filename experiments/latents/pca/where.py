"""Why does KV steering act where embedding steering does not? One edit, followed through the model.

For mean differences (c = ±1) and random directions of their norms, in every space: size of the edit against the natural
spread over prompts of what is edited, what arrives in the cache slot, attention of the end-of-thought token to the
slot, change at that token layer by layer, KL of the answer, and what is left of all that after the next latent and at
the end. Every change is divided by the natural spread over prompts of what changes.

Knows nothing about files, tables or claims.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import LatentRollout
from codi.decode import decode_answers
from codi.forced import divergence, forced
from experiments.study.parts import Workbench
from experiments.study.thoughts import Thoughts, derivation_means, think
from lm.terms import Part, Space
from steering.directions import Direction, difference, generator, random_direction
from steering.interventions import AddDirection
from steering.means import content_keys

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["BY", "KINDS", "MEASURES", "where_effects_go", "where_schema"]

KINDS: tuple[tuple[str, Space, Part], ...] = (
    ("kv", "kv", "both"), ("keys", "kv", "keys"), ("values", "kv", "values"),
    ("embedding", "embedding", "both"), ("hidden", "hidden", "both"),
)  # fmt: skip
"""Name of an edit, its space, and which part of a cache slot."""
MEASURES = ("edit_size", "slot", "attention", "kl", "z_next", "slot_next", "kl_next", "h_last", "kl_end")
"""What is measured once per edit; the changes at the end-of-thought token are measured once per layer, as eot_<layer>.

edit_size (of what is edited), slot (change of the cache slot of latent k), slot_next (of latent k + 1's), z_next (of
z_{k+1}), h_last (of h_n), attention (of the end-of-thought token to slot k, mean over layers and heads, early exit,
unedited; only with attention "eager"), kl (early exit), kl_next (one more latent), kl_end (all latents); NaN where it
was not measured or there is no next latent."""
BY = ("edit", "control")


def where_schema(n_layers: int) -> pa.Schema:
    """Columns: edit (of KINDS), control ("direction", "random"), the pair A−B, sign, latent, prompt, and what was
    measured."""
    words = {"edit": pa.string(), "control": pa.string()}
    numbers = {"source": pa.int16(), "target": pa.int16(), "sign": pa.int16(), "latent": pa.int16()}
    measured = dict.fromkeys([*MEASURES, *(f"eot_{layer}" for layer in range(n_layers + 1))], pa.float64())
    return pa.schema({**words, **numbers, **measured, "prompt_id": pa.string(), "cluster": pa.string()})


def _spread(x: Tensor) -> float:
    """Root mean square distance from the mean over prompts, all features together; at least a thousandth of the root
    mean square norm, so that what never changes is no divisor."""
    flat = x.double().flatten(1)
    floor = 1e-3 * float(flat.square().sum(1).mean().sqrt())
    return max(float((flat - flat.mean(0)).square().sum(1).mean().sqrt()), floor, 1e-9)


def _relative(x: Tensor, y: Tensor, scale: float) -> np.ndarray:
    """(prompt,) distance over a spread."""
    return ((x - y).double().flatten(1).norm(dim=1) / scale).cpu().numpy()


@dataclass(frozen=True)
class _Seen:
    """The forced answer after some latents: log-probabilities, which of its tokens count, states of the end-of-thought
    token (prompt, layer, d_model) and their spreads, attention from there."""

    tokens: Any
    logp: Tensor
    counted: Tensor
    states: Tensor
    spreads: tuple[float, ...]
    attention: Tensor | None


class _Unedited:
    """Prompts without any edit: rollout, slots, spreads, and the answer after each latent."""

    def __init__(self, model: CodiModel, thoughts: Thoughts, max_new_tokens: int | None) -> None:
        run = thoughts.run
        assert run.embeddings is not None and run.keys is not None and run.values is not None
        n = model.n_latents
        self.thoughts, self.run, self.embeddings = thoughts, run, run.embeddings
        self.slots = slots_of(run, model)
        self.slot_spread = [_spread(self.slots[:, k]) for k in range(n)]
        self.z_spread = [_spread(run.embeddings[:, k]) for k in range(n)]
        self.h_spread = [_spread(run.states[:, k]) for k in range(n + 1)]
        self.after: dict[int, _Seen] = {}
        eager = model.attention == "eager"
        for k in range(1, n + 1):
            plain = run.truncate(k)
            tokens = decode_answers(model, plain, max_new_tokens).tokens
            logp, counted, states, attention = forced(model, plain, tokens, hidden_states=True, attentions=eager)
            assert states is not None
            spreads = tuple(_spread(states[:, layer]) for layer in range(model.n_layers + 1))
            self.after[k] = _Seen(tokens, logp, counted, states, spreads, attention)


def slots_of(run: LatentRollout, model: CodiModel) -> Tensor:
    """(prompt, latent, layer, kv_head, 2 d_head): content keys and values side by side."""
    assert run.values is not None
    return torch.cat((content_keys(run, model).to(run.values.dtype), run.values), dim=-1)


def where_effects_go(
    bench: Workbench, *, pairs: int, prompts: int, max_new_tokens: int | None, seed: int
) -> pd.DataFrame:
    """One row per edit, control, pair, sign, latent and prompt, see `where_schema`.

    Args:
        bench: model and prompts.
        pairs: how many pairs A−B are followed, a seeded choice.
        prompts: on how many evaluation prompts.
        max_new_tokens: of the answers that are forced.
        seed: of pairs and random directions.
    """
    model = bench.model
    problems = bench.prompts.evaluation[:prompts]
    means = bench.once(derivation_means)
    unedited = _Unedited(model, think(model, problems, ("embeddings", "keys", "values", "cache")), max_new_tokens)
    everything = list(itertools.combinations(range(1, model.n_latents + 1), 2))
    order = generator(seed, "pca", "pairs").permutation(len(everything))[:pairs]
    frames = []
    for a, b in (everything[i] for i in sorted(order.tolist())):
        for name, space, part in KINDS:
            mean_difference = difference(means, a, b, space)
            rng = generator(seed, "pca", "where", name, a, b)
            tried = (("direction", mean_difference), ("random", random_direction(mean_difference, rng)))
            for control, direction in tried:
                for sign, k in itertools.product((1, -1), range(1, model.n_latents + 1)):
                    measured = _followed(model, unedited, direction, k, sign, part)
                    label = {"edit": name, "control": control, "source": a, "target": b, "sign": sign, "latent": k}
                    frames.append(pd.DataFrame({**label, **measured, **_names(problems)}))
    return pd.concat(frames, ignore_index=True)


def _names(problems: Sequence[Any]) -> dict[str, list[str]]:
    return {
        "prompt_id": [problem.prompt_id for problem in problems],
        "cluster": [problem.cluster or problem.prompt_id for problem in problems],
    }


def _followed(
    model: CodiModel, unedited: _Unedited, direction: Direction, k: int, sign: int, part: Part
) -> dict[str, np.ndarray]:
    """Everything that is measured of one edit at latent k, each (prompt,)."""
    n, size = model.n_latents, len(unedited.thoughts)
    run, before = unedited.run, unedited.after
    edit = AddDirection(direction, k, float(sign), part=part)
    edited = model.rollout(unedited.thoughts.prefill, n, [edit], keep=("embeddings", "keys", "values", "cache"))
    assert edited.embeddings is not None
    slots = slots_of(edited, model)
    logp, _, states, _ = forced(model, edited.truncate(k), before[k].tokens, hidden_states=True)
    assert states is not None
    slot = _relative(slots[:, k - 1], unedited.slots[:, k - 1], unedited.slot_spread[k - 1])
    unknown = np.full(size, np.nan)
    own = {"embedding": unedited.z_spread[k - 1], "hidden": unedited.h_spread[k - 1]}
    weights = before[k].attention
    found = {
        "edit_size": slot if direction.space == "kv" else np.full(size, direction.norm() / own[direction.space]),
        "slot": slot,
        "h_last": _relative(edited.states[:, -1], run.states[:, -1], unedited.h_spread[n]),
        "kl": divergence(before[k].logp, logp, before[k].counted).cpu().numpy(),
        "attention": unknown
        if weights is None
        else weights[..., run.prompt_width + k - 1].double().mean((1, 2)).cpu().numpy(),
        "slot_next": unknown,
        "z_next": unknown,
        "kl_next": unknown,
    }
    for layer, spread in enumerate(before[k].spreads):
        found[f"eot_{layer}"] = _relative(states[:, layer], before[k].states[:, layer], spread)
    if k < n:
        after, z = before[k + 1], edited.embeddings[:, k]
        found["slot_next"] = _relative(slots[:, k], unedited.slots[:, k], unedited.slot_spread[k])
        found["z_next"] = _relative(z, unedited.embeddings[:, k], unedited.z_spread[k])
        later = forced(model, edited.truncate(k + 1), after.tokens)[0]
        found["kl_next"] = divergence(after.logp, later, after.counted).cpu().numpy()
    final = forced(model, edited, before[n].tokens)[0]
    found["kl_end"] = divergence(before[n].logp, final, before[n].counted).cpu().numpy()
    return found
