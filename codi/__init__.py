"""CODI models: latent reasoning steps, their states and cache entries, in the open.

Glossary of latents (axes, layers, positions and units are those of `lm`). One more axis, between batch and layer::

    latent      latents 1..n; index k - 1 of an axis belongs to latent k

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

Coefficients are multiples of one mean difference.

Names are loaded when they are first asked for, so `import codi` and `import codi.protocol` do not import torch.
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from codi.checkpoint import load_codi, save_checkpoint
    from codi.decode import decode_answers
    from codi.forced import divergence
    from codi.interventions import Intervention
    from codi.known import KNOWN
    from codi.layout import CheckpointError
    from codi.model import CodiModel
    from codi.parts import Parts, Projection
    from codi.protocol import Protocol, UserError
    from codi.rollout import LatentRollout, Prefill
    from lm.text import EncodedBatch

__version__ = "0.1.0"

__all__ = [
    "KNOWN",
    "CheckpointError",
    "CodiModel",
    "EncodedBatch",
    "Intervention",
    "LatentRollout",
    "Parts",
    "Prefill",
    "Projection",
    "Protocol",
    "UserError",
    "__version__",
    "decode_answers",
    "divergence",
    "load_codi",
    "save_checkpoint",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "KNOWN": "codi.known",
        "CheckpointError": "codi.layout",
        "CodiModel": "codi.model",
        "EncodedBatch": "lm.text",
        "Intervention": "codi.interventions",
        "LatentRollout": "codi.rollout",
        "Parts": "codi.parts",
        "Prefill": "codi.rollout",
        "Projection": "codi.parts",
        "Protocol": "codi.protocol",
        "UserError": "codi.protocol",
        "decode_answers": "codi.decode",
        "divergence": "codi.forced",
        "load_codi": "codi.checkpoint",
        "save_checkpoint": "codi.checkpoint",
    },
)
