"""Which lenses a run reads, for its identity. Knows nothing about what a lens is: it hashes files."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["lens_digest"]


def lens_digest(folder: Path | None) -> str:
    """SHA-256 over the weights of every lens under a folder, with their places in it; "" for None."""
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("params.pt")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
