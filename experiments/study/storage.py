"""Which latents are said to carry what: the one mapping of published claims about storage to what a study edits.

Published: step 1 is read from h_2 and step 2 from h_4 (Cywiński et al.; their latents "3" and "5", patched, are the
embeddings that h_2 and h_4 are fed as); even latents store, odd ones compute (Scratchpad Thinking; the Latent Reasoning
Sprint, whose vectors 0..6 are h_0..h_6). What that says about an edit depends on what is edited:

    state      h_k, the last state at latent k                            h_2, h_4     even k
    slot       cache entry k, where later positions read what latent k    2, 4         even k
               computed; whoever stores at latent k leaves it there
    embedding  z_k = prj(h_{k-1}), what is fed at latent k: it carries    z_3, z_5     odd k
               the state of the latent BEFORE it

So an edit of z_k that hurts at odd k, and one of slot k that hurts at even k, are two sides of one claim; predicting
even latents for both, as the posts' "ablating even latents hurts most" may be read, would count one of them twice and
the other against itself. Imports nothing.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["STORING", "Carrier", "carrying", "parity"]

Carrier = Literal["state", "slot", "embedding"]
STORING = (2, 4)
"""Latents whose states are said to hold steps 1 and 2."""


def carrying(carrier: Carrier) -> tuple[int, ...]:
    """The latents at which this quantity is said to carry the steps: (2, 4), or (3, 5) for the fed embedding."""
    return tuple(latent + (carrier == "embedding") for latent in STORING)


def parity(carrier: Carrier) -> Literal[1, -1]:
    """+1 if the claim is about even latents, -1 if about odd ones."""
    return -1 if carrier == "embedding" else 1
