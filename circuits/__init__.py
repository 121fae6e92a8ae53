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
    from circuits.flow import Sources, flow_tree, mention_check, pathways, sources
    from circuits.heads import Heads, Reading, head_sets
    from circuits.knockout import ReferenceMeans, knocked_out, outliers, ranking, reference_means
    from circuits.mixing import Pairs, mixing_scores, pair_states
    from circuits.patching import Patched, Probe, patch, patch_set
    from circuits.rift import Rift, crossing_depth, pretraining_prior
    from circuits.writers import Writing, writing

__all__ = [
    "Heads",
    "Pairs",
    "Patched",
    "Probe",
    "Reading",
    "ReferenceMeans",
    "Rift",
    "Sources",
    "Writing",
    "crossing_depth",
    "flow_tree",
    "head_sets",
    "knocked_out",
    "mention_check",
    "mixing_scores",
    "outliers",
    "pair_states",
    "patch",
    "patch_set",
    "pathways",
    "pretraining_prior",
    "ranking",
    "reference_means",
    "sources",
    "writing",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Heads": "circuits.heads",
        "Pairs": "circuits.mixing",
        "Patched": "circuits.patching",
        "Probe": "circuits.patching",
        "Reading": "circuits.heads",
        "ReferenceMeans": "circuits.knockout",
        "Rift": "circuits.rift",
        "Sources": "circuits.flow",
        "Writing": "circuits.writers",
        "crossing_depth": "circuits.rift",
        "flow_tree": "circuits.flow",
        "head_sets": "circuits.heads",
        "knocked_out": "circuits.knockout",
        "mention_check": "circuits.flow",
        "mixing_scores": "circuits.mixing",
        "outliers": "circuits.knockout",
        "pair_states": "circuits.mixing",
        "patch": "circuits.patching",
        "patch_set": "circuits.patching",
        "pathways": "circuits.flow",
        "pretraining_prior": "circuits.rift",
        "ranking": "circuits.knockout",
        "reference_means": "circuits.knockout",
        "sources": "circuits.flow",
        "writing": "circuits.writers",
    },
)
