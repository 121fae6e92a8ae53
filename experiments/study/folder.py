"""The run folder: a manifest, a trial table in parts, and nothing half-written.

    manifest.json            options, protocol, split and checkpoint hashes, versions, seeds, git commit, time, memory
    trials/part-*.parquet    the trial table; a part is one (space, part, timing, prompt chunk)
    …                        means, statistics and figures, written by others through `RunFolder.write`

Every file is written under a temporary name, synced to disk and renamed, so a killed process leaves whole files only.
A part carries the fingerprint of the options it belongs to and page checksums; one that is truncated, damaged or
foreign counts as missing and is computed again. One process at a time holds the folder's lock.

Knows nothing about models, steering or statistics.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["SORT_COLUMNS", "TRIAL_SCHEMA", "RunFolder", "differences", "fingerprint", "versions"]

_TEXT = pa.dictionary(pa.int32(), pa.string())

TRIAL_SCHEMA = pa.schema([
    ("space", _TEXT), ("part", _TEXT), ("timing", _TEXT),
    ("source", pa.int16()), ("target", pa.int16()), ("coefficient", pa.float64()),
    ("control", _TEXT), ("draw", pa.int32()), ("latent", pa.int16()), ("n_latents", pa.int16()),
    ("prompt_id", _TEXT), ("cluster", _TEXT), ("template", _TEXT), ("operation", _TEXT),
    ("answer", pa.float64()), ("prediction", pa.float64()), ("text", _TEXT),
    ("correct", pa.bool_()), ("parsed", pa.bool_()), ("applied_norm", pa.float64()), ("first_token", pa.int32()),
])  # fmt: skip
"""Columns of the trial table, one row = one prompt × one condition. prediction is null where no number was found;
source and target are 0, draw is -1 where they do not apply."""

SORT_COLUMNS = (
    "space", "part", "timing", "control", "source", "target", "coefficient", "draw", "latent", "n_latents", "prompt_id",
)  # fmt: skip
_FINGERPRINT = b"codi-run"


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
        elif before != after:
            lines.append(f"{prefix}{key}: {_short(before)} -> {_short(after)}")
    return lines


def _short(value: Any, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"


def versions() -> dict[str, str]:
    """Versions of Python, the project and what it stands on, and the git commit ("" outside a clone)."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "command": " ".join(sys.argv)}
    packages = ("torch", "transformers", "tokenizers", "peft", "numpy", "pandas", "pyarrow", "scipy", "statsmodels")
    for package in ("codi-steering", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    for name, command in (("git_commit", ["rev-parse", "HEAD"]), ("git_changes", ["status", "--porcelain", "-uno"])):
        try:
            output = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            output = ""
        found[name] = output if name == "git_commit" else str(len(output.splitlines()))
    return found


class RunFolder:
    """One folder of one run.

    Args:
        path: the folder; it need not exist until `open`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fingerprint = ""

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        try:
            manifest = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not a run folder: it has no manifest.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.manifest_path} is damaged: {error}") from None
        if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
            raise ValueError(f"{self.manifest_path} is damaged: it has no identity")
        return manifest

    @contextmanager
    def open(self, identity: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[bool]:
        """Begin the run or go on with it, alone.

        Args:
            identity: everything that decides the result (JSON); a folder with another one is refused.
            record: what else the manifest should hold when the run begins (JSON).

        Yields:
            Whether the folder held this run already.

        Raises:
            ValueError: the folder belongs to another configuration (the difference is listed), is not a run folder but
                not empty either, or another process is writing to it.
            OSError: it cannot be written.
        """
        identity = json.loads(json.dumps(identity))
        self.fingerprint = fingerprint(identity)
        known = self.manifest_path.exists()
        if known:
            found = differences(self.manifest()["identity"], identity)
            if found:
                raise ValueError(
                    f"{self.path} holds a run with other options; choose another --out or the same options. "
                    f"Differences (there -> now): {'; '.join(found)}"
                )
        elif self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, not a folder")
        elif self.path.exists() and any(
            path.name not in (".lock", "trials") and path.suffix != ".partial" for path in self.path.rglob("*")
        ):
            raise ValueError(f"{self.path} is not empty and not a run folder; choose another --out")
        self._try_to_write(lambda: (self.path / "trials").mkdir(parents=True, exist_ok=True))
        with self._lock():
            for leftover in [*self.path.glob("*.partial"), *(self.path / "trials").glob("*.partial")]:
                self._try_to_write(leftover.unlink)
            if not known:
                self.write_json("manifest.json", {"identity": identity, "fingerprint": self.fingerprint, **record})
            yield known

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Held while the run is open; the system lets go of it when the process ends, however that happens."""
        handle = self._try_to_write(lambda: os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644))
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing to {self.path}") from None
            except OSError:  # a file system without locks: go on without one
                pass
            yield
        finally:
            os.close(handle)

    def _try_to_write(self, action: Any) -> Any:
        try:
            return action()
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> OSError:
        advice = "finished parts are kept and the same command goes on from them"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full; make room: {advice}"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = "it is read-only or belongs to somebody else"
        else:
            reason = f"{error.strerror or error}; {advice}"
        return OSError(f"cannot write to {self.path}: {reason}")

    # --- Files, whole or not at all ---

    def write(self, name: str, content: bytes) -> Path:
        """Write one file: temporary name, synced, renamed.

        Args:
            name: path inside the folder.
            content: bytes of the file.

        Raises:
            OSError: one line on why it could not be written. Nothing else in the folder has changed.
        """
        path = self.path / name
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._refused(error) from error
        except BaseException:  # Ctrl-C: leave no temporary file
            partial.unlink(missing_ok=True)
            raise
        return path

    def write_json(self, name: str, record: Mapping[str, Any]) -> Path:
        """Write a JSON file."""
        return self.write(name, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    def add_to_manifest(self, **values: Any) -> None:
        """Add or replace entries of the manifest; the identity stays as it is."""
        assert not {"identity", "fingerprint"} & values.keys(), "the identity of a run never changes"
        self.write_json("manifest.json", {**self.manifest(), **values})

    # --- Parts of the trial table ---

    def part_path(self, name: str) -> Path:
        """Where a part is."""
        return self.path / "trials" / f"part-{name}.parquet"

    def has_part(self, name: str, rows: int) -> bool:
        """Whether a whole part with that many rows, of this run, is there; every page's checksum is verified."""
        try:
            table = pq.read_table(self.part_path(name), page_checksum_verification=True)
        except (FileNotFoundError, pa.ArrowException, OSError, ValueError):
            return False
        given = (table.schema.metadata or {}).get(_FINGERPRINT)
        if given != self.fingerprint.encode():
            return False
        return table.num_rows == rows and table.column_names == TRIAL_SCHEMA.names

    def write_part(self, name: str, trials: Mapping[str, Any]) -> Path:
        """Write one part of the trial table.

        Args:
            name: of the part; the file is trials/part-{name}.parquet.
            trials: column -> values, the columns of TRIAL_SCHEMA.
        """
        arrays = []
        for field in TRIAL_SCHEMA:
            if field.type == _TEXT:
                arrays.append(pa.array(trials[field.name], pa.string()).dictionary_encode())
            else:
                arrays.append(pa.array(trials[field.name], field.type, from_pandas=True))
        schema = TRIAL_SCHEMA.with_metadata({_FINGERPRINT: self.fingerprint.encode()})
        buffer = io.BytesIO()
        table = pa.Table.from_arrays(arrays, schema=schema)
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return self.write(f"trials/part-{name}.parquet", buffer.getvalue())

    def trials(self) -> pd.DataFrame:
        """The whole trial table, sorted, whatever order or number of sittings its parts were computed in.

        Raises:
            ValueError: no parts, or one that cannot be read.
        """
        paths = sorted((self.path / "trials").glob("part-*.parquet"))
        if not paths:
            raise ValueError(f"{self.path} has no trials yet")
        tables = []
        for path in paths:
            try:
                tables.append(pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None))
            except (pa.ArrowException, OSError) as error:
                message = f"{path} is damaged ({error}); run the sweep again: it computes this part anew"
                raise ValueError(message) from error
        table = pa.concat_tables(tables).unify_dictionaries().to_pandas()
        for column in table.columns:  # categories in order, so that sorting and equality mean what they say
            if isinstance(table[column].dtype, pd.CategoricalDtype):
                table[column] = table[column].cat.set_categories(sorted(table[column].cat.categories))
        return table.sort_values(list(SORT_COLUMNS), kind="stable", ignore_index=True)
