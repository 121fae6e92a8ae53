"""Where a checkpoint and its base model are, folder or hub id; and what a folder says about itself.

Knows nothing about weights or tokenizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from codi.known import KNOWN, KnownCheckpoint, known_checkpoint
from codi.protocol import UserError
from codi.trained import has_trained
from lm.places import SMOLLM2, refuse_missing
from lm.weights import read_object

__all__ = ["BASE_FOLDER", "Place", "base_folder", "locate"]

CHECKPOINT, BASE = "checkpoint", "base model"
CHECKPOINTS, BASE_FOLDER = "checkpoints", "base"
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer*", "*.txt", "*.model")
BASE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt")


# --- Where things are -------------------------------------------------------------------------------------------------


def _is_hub_id(name: str, what: str) -> bool:
    """Whether a name that is no folder can be a hub id: owner/name, for a base model also a bare name such as gpt2."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        return False
    if "/" not in name:
        return what != CHECKPOINT
    owner = name.split("/")[0]
    return owner != CHECKPOINTS and not Path(owner).is_dir()


def _find(
    name: str | Path, what: str, patterns: Sequence[str], mirrors: Sequence[str] = (), needs: str | None = None
) -> Path:
    """Folder of a checkpoint or base model: a folder is used as it is, a hub id is downloaded."""
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{what} {text} is a file; give the folder that holds it")
    if not _is_hub_id(text, what):
        raise UserError(f"{what} {text} does not exist: give a folder or a hub id such as {next(iter(KNOWN))}")
    place = f"{CHECKPOINTS}/{text.rsplit('/', 1)[-1]}"
    option = "give that folder" if what == CHECKPOINT else f"give base={place}"
    other = f" ({' or '.join(mirrors)} has the same files)" if mirrors else ""
    if needs is not None:
        option += f", with base= its base model {needs}, got in the same way"
    try:
        return Path(snapshot_download(text, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{what} {text} is gated on the Hugging Face hub: accept its licence and log in{other}, "
            f"or download it to {place} and {option}"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{what} {text} is neither a folder here nor on the Hugging Face hub") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{what} {text} is not a folder here and the Hugging Face hub cannot be reached: on a machine with a "
            f"connection run 'hf download {text} --local-dir {place}'{other}, copy it to {place} here and {option}"
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """codi.json of a folder, checked; empty if there is none."""
    path = folder / "codi.json"
    if not path.is_file():
        return {}
    settings = read_object(path)
    for name, (kind, low, words) in SETTINGS.items():
        value: Any = settings.get(name)
        if name not in settings or (value is None and name in ("prj_dim", "lora_alpha")):
            continue
        good = isinstance(value, kind) and not isinstance(value, bool)
        if not (good and (isinstance(value, str | dict) or low <= value < math.inf)):
            raise UserError(f"{path}: {name} must be {words}, got {value!r}"[:500])
    return settings


SETTINGS: dict[str, tuple[tuple[type, ...], float, str]] = {
    "base": ((str,), 0, "a folder or a hub id"),
    "protocol": ((str, dict), 0, "the name of a family or what Protocol.to_dict gave"),
    "lora_r": ((int,), 0, "a whole number, 0 or more"),
    "lora_alpha": ((int, float), 0, "a number, 0 or more"),
    "n_latents": ((int,), 0, "a whole number, 0 or more"),
    "prj_dim": ((int,), 1, "a whole number, 1 or more"),
}
"""Entries of codi.json that loading reads: type, smallest value, in words."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint and its base model are, and what the checkpoint's folder says about itself."""

    where: str
    folder: Path
    settings: dict[str, Any]
    known: KnownCheckpoint | None
    base_name: str
    base_folder: Path


def base_folder(name: str) -> Path:
    """Folder of a base model with its weights; that of a hub id is fetched if need be."""
    return _find(name, BASE, CHECKPOINT_FILES)


def locate(path: str | Path, base: str | Path | None) -> Place:
    where = str(path)
    known = known_checkpoint(where)
    needs = None if known is None else known.base if base is None else str(base)
    folder = _find(path, CHECKPOINT, CHECKPOINT_FILES, (), needs)
    settings = _read_settings(folder)
    base_name = base if base is not None else settings.get("base")
    if base_name is None and known is not None:
        base_name = known.base
    if base_name is None:
        raise UserError(f"{where} does not say what its base model is: give base= (a folder or a hub id)")
    if base is None and "base" in settings:
        if (folder / str(base_name)).is_dir():
            base_name = folder / str(base_name)
        elif str(base_name) == BASE_FOLDER:
            raise UserError(f"{folder / BASE_FOLDER} is missing: {folder / 'codi.json'} names it as the base model")
        elif Path(str(base_name)).name == SMOLLM2:
            refuse_missing(str(folder / str(base_name)), folder / str(base_name))
    # The weights of the base are wanted only where the checkpoint does not hold them.
    files = CHECKPOINT_FILES if has_trained(folder) else BASE_FILES
    found = _find(base_name, BASE, files, known.mirrors if known else ())
    return Place(where, folder, settings, known, str(base_name), found)
