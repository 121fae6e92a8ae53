"""CODI models: latent reasoning steps, their states and cache entries, in the open.

Glossary, used by every package of this repository. Axes, always in this order::

    batch       prompts
    latent      latents 1..n; index k - 1 of an axis belongs to latent k
    layer       hidden states: 0..n_layers, 0 = what enters the first block, n_layers = last state, after the final norm
                (never norm it again); keys and values: one entry per block, index l belongs to block l + 1
    head, kv_head, d_head, d_model, vocab

Quantities::

    h_0         last state at the begin-of-thought token
    z_k         prj(h_{k-1}), the embedding FED at latent k                              k = 1..n
    h_k         last state that results at latent k
    KV entry k  the cache slot that latent k wrote (keys after the rotary rotation)

Latents are numbered 1..n wherever a person or a table sees one. Other numberings in the literature:

=============================================  ==================================  =====================
where                                          theirs                              here
=============================================  ==================================  =====================
Cywiński et al., latent vectors                0..6                                h_0..h_6
Cywiński et al., "third", "fifth" latent       index 2, 4                          h_2, h_4
Cywiński et al., patching position p           p = 0..5                            replaces z_{p+1}
latent-pair steering plots                     latent k                            latent k
tuned-lens training of the same                index k - 1 (0-based)               latent k
=============================================  ==================================  =====================

Units: probabilities and accuracies are fractions; entropies, divergences and log-probabilities are in nats;
coefficients are multiples of one mean difference.
"""

from codi.checkpoint import KNOWN, CheckpointError, load_codi, save_checkpoint
from codi.decode import Answers, decode_answers
from codi.model import CodiModel, Projection
from codi.protocol import Protocol, UserError
from codi.rollout import EncodedBatch, Intervention, LatentRollout, Prefill

__version__ = "0.1.0"

__all__ = [
    "KNOWN",
    "Answers",
    "CheckpointError",
    "CodiModel",
    "EncodedBatch",
    "Intervention",
    "LatentRollout",
    "Prefill",
    "Projection",
    "Protocol",
    "UserError",
    "__version__",
    "decode_answers",
    "load_codi",
    "save_checkpoint",
]
