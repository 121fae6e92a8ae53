"""What a run folder says about itself, read without any library: whose run it is, and how it differs from another.

The manifest holds an `identity`, everything that decides the result of the run, and a record of how it came about. Two
runs are the same if their identities are. Knows nothing about tables or models (see folder.py for what is written).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_out", "command_of", "differences", "fingerprint", "read_manifest", "refuse_other"]


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the result of a run (any JSON value), independent of key order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested records, as "name: old -> new" lines."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:  # what is only in one of them has its default in the other
            shown = [_short(one[key]) if key in one else "not given" for one in (old, new)]
            lines.append(f"{prefix}{key}: {' -> '.join(shown)}")
    return lines


def _short(value: Any, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a run folder: it has no manifest.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        raise ValueError(f"{path} is damaged or of an early version: it has no identity; choose another --out")
    return manifest


def command_of(identity: Mapping[str, Any]) -> str:
    """The command whose run has this identity, without `codi`; "" if it does not tell.

    Studies say it under "study", the lens commands under "command"; a sweep says neither but has parts of prompts.
    """
    for key in ("study", "command"):
        if isinstance(identity.get(key), str):
            return identity[key]
    return "sweep" if "part_prompts" in identity else ""


def refuse_other(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compare the identity found in a folder with that of the run which wants it.

    Raises:
        ValueError: another command's run, or other options (every difference is listed).
    """
    before, now = command_of(old), command_of(new)
    if before != now and before and now:
        raise ValueError(f"{path} is a run of `codi {before}`, not of `codi {now}`; choose another --out")
    found = differences(old, new)
    if found:
        raise ValueError(
            f"{path} holds a run with other options; choose another --out or the same options. "
            f"Differences (there -> now): {'; '.join(found)}"
        )


def check_out(out: Path | None, command: str, options: Mapping[str, Any]) -> None:
    """Refuse a folder that can be seen to hold another run before the model is loaded.

    Args:
        out: the folder; None: it is not known before the model is.
        command: that wants to write there, without `codi`.
        options: those that are part of the identity, plain JSON values.

    Raises:
        ValueError: as `refuse_other`, or the folder's manifest is damaged.
    """
    if out is None or not (out / "manifest.json").exists():
        return
    old = read_manifest(out)["identity"]
    before = command_of(old)
    if before != command:
        refuse_other(out, old, {"study": command})
    known = old.get("options")
    if before and before != "sweep" and isinstance(known, dict):  # the options of a sweep are its resolved grid
        refuse_other(out, {"study": before, "options": known}, {"study": command, "options": dict(options)})
