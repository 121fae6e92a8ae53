"""The published checkpoints, and what they do not say about themselves. Data alone: imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["KNOWN", "PUBLISHED_ALPHA", "PUBLISHED_R", "KnownCheckpoint", "known_checkpoint"]

PUBLISHED_R, PUBLISHED_ALPHA = 128, 32


@dataclass(frozen=True)
class KnownCheckpoint:
    """What a published checkpoint does not say about itself."""

    protocol: str
    base: str
    lora_r: int = PUBLISHED_R
    lora_alpha: float = PUBLISHED_ALPHA
    mirrors: tuple[str, ...] = field(default=())


KNOWN = {
    "zen-E/CODI-llama3.2-1b-Instruct": KnownCheckpoint(
        "original", "meta-llama/Llama-3.2-1B-Instruct", mirrors=("unsloth/Llama-3.2-1B-Instruct",)
    ),
    "zen-E/CODI-gpt2": KnownCheckpoint("original", "openai-community/gpt2", mirrors=("gpt2",)),
    "bcywinski/codi_llama1b-answer_only": KnownCheckpoint(
        "answer-only", "meta-llama/Llama-3.2-1B-Instruct", mirrors=("unsloth/Llama-3.2-1B-Instruct",)
    ),
}
"""Published checkpoints by hub id; a folder with the same last name is taken for a copy of it."""


def known_checkpoint(name: str) -> KnownCheckpoint | None:
    """What is known of a published checkpoint, by its hub id or the last part of it; None: it is not published."""
    last = Path(name).name
    return next((known for hub_id, known in KNOWN.items() if name == hub_id or last == hub_id.split("/")[1]), None)
