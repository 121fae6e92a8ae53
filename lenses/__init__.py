"""Lenses on latents: what a hidden state, at any latent and layer, says in the model's own vocabulary.

`latent_lens` reads states through the logit lens or through tuned lenses (tuned_lens's own classes and save format),
`training` fits tuned lenses to streamed rollouts, `causal` asks whether the directions a lens reads are the ones the
model uses. Axes, indices and units are those of `codi`; position 0 is the begin-of-thought token, positions 1..n are
the latents, position TEXT any token of ordinary text. Only this package touches tuned_lens.

    lens = LatentLens.plain(model)
    run = model.rollout(model.encode(["question"]))
    lens.logits(run.hidden_states[:, 2, 1], layer=1, position=3)        # latent 3, layer 1: (batch, vocab)
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from lenses.causal import AblateDirections, CausalBasis, causal_basis, mean_ablated
    from lenses.latent_lens import (
        TEXT,
        LatentLens,
        States,
        latent_states,
        lens_positions,
        load_lenses,
        new_lens,
        save_lens,
        text_states,
        unembed,
    )
    from lenses.training import LensTraining, TrainingOptions, divergence_to_output

__all__ = [
    "TEXT",
    "AblateDirections",
    "CausalBasis",
    "LatentLens",
    "LensTraining",
    "States",
    "TrainingOptions",
    "causal_basis",
    "divergence_to_output",
    "latent_states",
    "lens_positions",
    "load_lenses",
    "mean_ablated",
    "new_lens",
    "save_lens",
    "text_states",
    "unembed",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "AblateDirections": "lenses.causal",
        "CausalBasis": "lenses.causal",
        "LatentLens": "lenses.latent_lens",
        "LensTraining": "lenses.training",
        "States": "lenses.latent_lens",
        "TEXT": "lenses.latent_lens",
        "TrainingOptions": "lenses.training",
        "causal_basis": "lenses.causal",
        "divergence_to_output": "lenses.training",
        "latent_states": "lenses.latent_lens",
        "lens_positions": "lenses.latent_lens",
        "load_lenses": "lenses.latent_lens",
        "mean_ablated": "lenses.causal",
        "new_lens": "lenses.latent_lens",
        "save_lens": "lenses.latent_lens",
        "text_states": "lenses.latent_lens",
        "unembed": "lenses.latent_lens",
    },
)
