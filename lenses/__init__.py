"""Lenses on latents: what a hidden state, at any latent and layer, says in the model's own vocabulary.

`latent_lens` reads states through the logit lens or through tuned lenses (tuned_lens's own classes and save format),
`training` fits tuned lenses to streamed rollouts, `causal` asks whether the directions a lens reads are the ones the
model uses. Axes, indices and units are those of `codi`; position 0 is the begin-of-thought token, positions 1..n are
the latents, position TEXT any token of ordinary text. Only this package touches tuned_lens.

    lens = LatentLens.plain(model)
    run = model.rollout(model.encode(["question"]))
    lens.logits(run.hidden_states[:, 2, 1], layer=1, position=3)        # latent 3, layer 1: (batch, vocab)
"""

from lenses.causal import AblateDirections, CausalBasis, causal_basis, mean_ablated
from lenses.latent_lens import (
    TEXT,
    LatentLens,
    States,
    final_norm,
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
    "final_norm",
    "latent_states",
    "lens_positions",
    "load_lenses",
    "mean_ablated",
    "new_lens",
    "save_lens",
    "text_states",
    "unembed",
]
