"""The run folder: a manifest, trial tables in parts, and nothing half-written.

    manifest.json            identity (options, protocol, split and checkpoint hashes), versions, git commit, sittings
    trials/part-*.parquet    trial tables; a part is what is computed in one go, with the columns that its study gives
    result.json              what the study found (result.py)
    …                        means, tables and figures, written through `RunFolder.write`

Every file is written under a temporary name, synced to disk and renamed, so a killed process leaves whole files only.
A part carries the fingerprint of the options it belongs to and page checksums; one that is truncated, damaged, foreign
or of other columns counts as missing and is computed again. One process at a time holds the folder's lock.

Knows nothing about models, steering or statistics, nor about the columns of any study.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.study.manifest import command_of, differences, fingerprint, read_manifest, refuse_other

__all__ = ["TEXT", "RunFolder", "differences", "fingerprint", "open_run", "versions", "write_whole"]

TEXT = pa.dictionary(pa.int32(), pa.string())
"""Type of a text column with few distinct values."""
_FINGERPRINT = b"codi-run"


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
        return read_manifest(self.path)

    @contextmanager
    def open(self, identity: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[bool]:
        """Begin the run or go on with it, alone.

        Args:
            identity: everything that decides the result (JSON); a folder with another one is refused.
            record: what else the manifest should hold when the run begins (JSON).

        Yields:
            Whether the folder held this run already.

        Raises:
            ValueError: the folder belongs to another command or to other options (the difference is listed), is not a
                run folder but not empty either, or another process is writing to it.
            OSError: it cannot be written.
        """
        identity = json.loads(json.dumps(identity))
        self.fingerprint = fingerprint(identity)
        known = self.manifest_path.exists()
        if known:
            refuse_other(self.path, self.manifest()["identity"], identity)
        elif self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, not a folder")
        elif self.path.exists() and any(
            path.name not in (".lock", "trials") and path.suffix != ".partial" for path in self.path.rglob("*")
        ):
            raise ValueError(f"{self.path} is not empty and not a run folder; choose another --out")
        self._try_to_write(lambda: self.path.mkdir(parents=True, exist_ok=True))
        with self._lock():
            for leftover in [*self.path.glob("*.partial"), *self.path.glob("*/*.partial")]:
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

    def _try_to_write(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise _refused(self.path, error) from error

    # --- Files, whole or not at all ---

    def write(self, name: str, content: bytes) -> Path:
        """Write one file: temporary name, synced, renamed.

        Args:
            name: path inside the folder.
            content: bytes of the file.

        Raises:
            OSError: one line on why it could not be written. Nothing else in the folder has changed.
        """
        try:
            return write_whole(self.path / name, content)
        except OSError as error:
            raise _refused(self.path, error) from error

    def write_json(self, name: str, record: Mapping[str, Any]) -> Path:
        """Write a JSON file."""
        return self.write(name, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())

    def add_to_manifest(self, **values: Any) -> None:
        """Add or replace entries of the manifest; the identity stays as it is."""
        assert not {"identity", "fingerprint"} & values.keys(), "the identity of a run never changes"
        self.write_json("manifest.json", {**self.manifest(), **values})

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table as {name}.csv, or as it is where the name ends in .parquet."""
        if name.endswith(".parquet"):
            return self.write(name, table.to_parquet(index=False))
        return self.write(f"{name}.csv", table.to_csv(index=False).encode())

    # --- Parts of the trial tables ---

    def part_path(self, name: str) -> Path:
        """Where a part is."""
        return self.path / "trials" / f"part-{name}.parquet"

    def has_part(self, name: str, schema: pa.Schema | None, rows: int | None = None) -> bool:
        """Whether a whole part of this run is there; every page's checksum is verified.

        Args:
            name: of the part.
            schema: columns and types that it must have; None: any.
            rows: that it must have; None: any number.
        """
        try:
            table = pq.read_table(self.part_path(name), page_checksum_verification=True)
        except (FileNotFoundError, pa.ArrowException, OSError, ValueError):
            return False
        if (table.schema.metadata or {}).get(_FINGERPRINT) != self.fingerprint.encode():
            return False
        return (rows is None or table.num_rows == rows) and (schema is None or table.schema.equals(schema))

    def write_part(self, name: str, trials: pd.DataFrame | Mapping[str, Any], schema: pa.Schema | None = None) -> Path:
        """Write one part of a trial table.

        Args:
            name: of the part; the file is trials/part-{name}.parquet.
            trials: column -> values; exactly the columns of the schema, in any order.
            schema: columns and types; None: those that the frame has.

        Raises:
            ValueError: other columns than the schema has, or values that are not of its types.
        """
        mark = {_FINGERPRINT: self.fingerprint.encode()}
        if schema is None:
            table = pa.Table.from_pandas(pd.DataFrame(trials), preserve_index=False)
            table = table.replace_schema_metadata({**(table.schema.metadata or {}), **mark})
        else:
            table = _typed(name, trials, schema).replace_schema_metadata(mark)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return self.write(f"trials/part-{name}.parquet", buffer.getvalue())

    def read_parts(self, names: Sequence[str]) -> pd.DataFrame:
        """Some parts of one trial table, one after another.

        Raises:
            ValueError: one that cannot be read.
        """
        tables = [self._read(self.part_path(name)) for name in names]
        return tables[0].to_pandas() if len(tables) == 1 else pa.concat_tables(tables).unify_dictionaries().to_pandas()

    def trials(self, sort: Sequence[str] = ()) -> pd.DataFrame:
        """All parts as one table, sorted, whatever order or number of sittings they were computed in.

        Args:
            sort: columns to sort by; texts in alphabetical order.

        Raises:
            ValueError: no parts, or one that cannot be read.
        """
        paths = sorted((self.path / "trials").glob("part-*.parquet"))
        if not paths:
            raise ValueError(f"{self.path} has no trials yet")
        table = pa.concat_tables([self._read(path) for path in paths]).unify_dictionaries().to_pandas()
        for column in table.columns:  # categories in order, so that sorting and equality mean what they say
            if isinstance(table[column].dtype, pd.CategoricalDtype):
                table[column] = table[column].cat.set_categories(sorted(map(str, table[column].cat.categories)))
        return table.sort_values(list(sort), kind="stable", ignore_index=True) if sort else table

    def _read(self, path: Path) -> pa.Table:
        try:
            return pq.read_table(path, page_checksum_verification=True).replace_schema_metadata(None)
        except (pa.ArrowException, OSError) as error:
            message = f"{path} is damaged ({error}); run the same command again: it computes this part anew"
            raise ValueError(message) from error


def _typed(name: str, trials: pd.DataFrame | Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """Columns in the order and with the types of a schema."""
    given, wanted = set(map(str, trials)), set(schema.names)
    if given != wanted:
        odd = [f"no {column!r}" for column in sorted(wanted - given)]
        odd += [f"{column!r} is not in its schema" for column in sorted(given - wanted)]
        raise ValueError(f"part {name}: {'; '.join(odd)}")
    arrays = []
    for field in schema:
        values = np.asarray(trials[field.name])
        try:
            if pa.types.is_dictionary(field.type):
                arrays.append(pa.array(values, pa.string()).dictionary_encode())
            else:
                arrays.append(pa.array(values, field.type, from_pandas=True))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"part {name}, column {field.name}: {error}") from error
    return pa.Table.from_arrays(arrays, schema=schema)


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all: temporary name, synced, renamed.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
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
    except BaseException:  # Ctrl-C too: leave no temporary file
        partial.unlink(missing_ok=True)
        raise
    return path


def _refused(path: Path, error: OSError) -> OSError:
    """Why a folder could not be written to, in one line."""
    advice = "finished parts are kept and the same command goes on from them"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"the disk is full; make room: {advice}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = "it is read-only or belongs to somebody else"
    else:
        reason = f"{error.strerror or error}; {advice}"
    return OSError(f"cannot write to {path}: {reason}")


@contextmanager
def open_run(
    out: Path,
    identity: Mapping[str, Any],
    *,
    model: str,
    about: str = "",
    say: Callable[[str], None] = lambda line: None,
    **record: Any,
) -> Iterator[RunFolder]:
    """Begin or go on with the run of a command, with or without trial tables.

    Args:
        out: the folder.
        identity: what decides the result (JSON); it names the command under "study" or "command".
        model: as the options name it, for the manifest.
        about: said when the run begins, such as "160 prompts in 20 clusters".
        say: called with lines for a person.
        **record: what else the manifest should hold when the run begins (JSON).

    Yields:
        The open folder. When the block ends, the manifest gets one more entry under "sittings".

    Raises:
        ValueError, OSError: as `RunFolder.open`.
    """
    folder, began = RunFolder(out), time.time()
    with folder.open(identity, {"model": model, **record, "versions": versions()}) as known:
        say(f"{'continuing' if known else 'starting'} {command_of(identity)}: {model}{', ' if about else ''}{about}")
        yield folder
        sittings = folder.manifest().get("sittings", [])
        folder.add_to_manifest(sittings=[*sittings, {"seconds": round(time.time() - began, 1)}])
