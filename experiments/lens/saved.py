"""Lenses by name from the folder of `codi lens train`, and what decides the result of a command that reads them.

Knows nothing about prompts or measures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codi import CodiModel
from experiments.lens.options import LensRunOptions
from experiments.study.options import identity_of
from experiments.study.parts import Workbench
from experiments.tasks.split import Split
from lenses.latent_lens import LatentLens, SavedLens, choose_lens, load_lenses, slug, unembed

__all__ = ["lens_hash", "lens_identity", "lenses_of", "load_lens", "load_trained", "reading_identity"]


def load_lens(names: Sequence[str], folder: Path, model: CodiModel) -> list[LatentLens]:
    """Lenses by name; the folder is read only if one of them was trained.

    Raises:
        ValueError: no names, a name twice, a lens that is not there or is for another model.
    """
    if not names:
        raise ValueError("read must name at least one lens, got none")
    if len({slug(name) for name in names}) < len(names):
        raise ValueError(f"read names a lens twice: {', '.join(names)}")
    shared = unembed(model)
    saved = {} if set(names) == {"plain"} else load_lenses(folder, model, shared)
    return [choose_lens(name, saved, model, shared) for name in names]


def load_trained(folder: Path, model: CodiModel) -> dict[str, SavedLens]:
    """Every lens that was trained, by name."""
    return load_lenses(folder, model, unembed(model))


def lenses_of(bench: Workbench, names: tuple[str, ...], folder: str) -> list[LatentLens]:
    """Lenses by name, for the parts of a study (see `Workbench.once`)."""
    return load_lens(names, Path(folder), bench.model)


def lens_hash(folder: Path) -> str:
    """Hash of the lens files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("params.pt")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def lens_identity(options: LensRunOptions, model: CodiModel, **more: Any) -> dict[str, Any]:
    """Everything that decides the result of a lens command.

    Args:
        options: resolved.
        model: the model.
        **more: what else decides it (JSON).
    """
    return {
        "command": options.COMMAND,
        "options": identity_of(options),
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
        **more,
    }


def reading_identity(options: Any, model: CodiModel, prompts: Split) -> dict[str, Any]:
    """`lens_identity` of a study that reads lenses: with a hash of them unless only the logit lens is read."""
    return lens_identity(options, model, lens="" if set(options.read) == {"plain"} else lens_hash(options.lens))
