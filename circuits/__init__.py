"""Circuits: which heads make a prediction, from where, and what is left when the others are silenced.

`heads` reads and replaces what heads say; `patching` asks which of them bring a prediction back; `knockout` silences
all others; `writers` and `flow` ask who writes an answer and from where it comes; `mixing` and `rift` what residual
streams know of words and of contexts. Axes, layers and units are those of `lm`: blocks from 1, heads from 0; index b of
an axis `block` belongs to block b + 1. Runs on any model that `lm` loads; writes no files and prints nothing.

    heads = Heads(model)
    found = patch(heads, [Probe(clean_ids, corrupted_ids, target, other)])
    found.effect()                                                       # (block, head), 1 = full recovery
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from circuits.heads import Heads, Reading, head_sets
    from circuits.patching import Patched, Probe, patch, patch_set

__all__ = ["Heads", "Patched", "Probe", "Reading", "head_sets", "patch", "patch_set"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Heads": "circuits.heads",
        "Patched": "circuits.patching",
        "Probe": "circuits.patching",
        "Reading": "circuits.heads",
        "head_sets": "circuits.heads",
        "patch": "circuits.patching",
        "patch_set": "circuits.patching",
    },
)
