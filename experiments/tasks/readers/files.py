"""From a file to its records, each with the place that a message names: "F, line 3", "F: record 3".

Text is decoded here (byte-order marks, packed files), lines are cut here. Knows nothing about what a record means.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from experiments.tasks.numbers import shown

__all__ = ["FILE_TYPES", "Line", "Placed", "Record", "names_of", "read_placed", "split_files", "stem_of", "type_of"]

FILE_TYPES = (".json", ".jsonl", ".txt", ".parquet", ".csv", ".tsv")
SPLIT_NAMES = ("train", "test", "valid", "validation", "dev", "derivation")
"""Names of text files in a folder that are splits of one data set."""
LISTS = ("prompts", "data", "rows")
"""Keys of a JSON object under which the list of records may stand."""

Placed = tuple[str, Any]
"""Where a record stands, and what stands there."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Line(str):
    """A line of a text file, which is a whole record."""


class Record(dict[str, Any]):
    """A JSON object that remembers a key that it was given twice ("" if there is none)."""

    twice: str = ""


def type_of(path: Path) -> str:
    """Ending that says how to read the file, in small letters, without ".gz"; "" for none."""
    packed = path.suffix.lower() == ".gz"
    return Path(path.stem if packed else path.name).suffix.lower()


def stem_of(path: Path) -> str:
    """Name of the file without its endings; prompt ids begin with it."""
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def split_files(folder: Path, split: str) -> list[Path]:
    """Text files of a folder that holds no other data, those of the split where they are named after splits.

    Returns:
        Files in the order of their names; empty: the folder is of another kind.

    Raises:
        ValueError: the files are named after splits and the one asked for is not among them.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if type_of(entry) == ".txt" and entry.is_file()]
    others = [entry for entry in entries if entry not in files]
    if any(entry.is_dir() or type_of(entry) in (*FILE_TYPES, ".arrow", ".zip", ".xml") for entry in others):
        return []
    splits = {stem_of(file).lower(): file for file in files}
    if not set(splits) & set(SPLIT_NAMES):
        if files and split not in ("test", "train", "derivation", "all", "published"):
            raise ValueError(f"{folder}: a folder of text files has no split {split!r}: leave --split out")
        return files
    chosen = splits.values() if split == "all" else [splits[part] for part in split.split("+") if part in splits]
    if not chosen or len(chosen) < len(split.split("+")):
        raise ValueError(f"{folder} has no split {split!r}; allowed: {', '.join(sorted(splits))}, all")
    return list(chosen)


def read_placed(path: Path) -> list[Placed]:
    """Records of one file, in order, none of them looked at.

    Raises:
        ValueError: not a file of a known type, cannot be read or unpacked, empty, or broken.
    """
    kind = type_of(path)
    if kind not in FILE_TYPES or (kind == ".parquet" and path.suffix.lower() == ".gz"):
        raise ValueError(f"{path}: the name must end in one of {', '.join(FILE_TYPES)} (.gz after all but .parquet)")
    if kind == ".parquet":
        return _parquet(path)
    text = _text(path)
    if kind == ".txt":
        return [(where, Line(line)) for where, line in _lines(text, path)]
    if kind == ".jsonl":
        return [(where, _json(line, where, "column {error.colno}")) for where, line in _lines(text, path)]
    if kind in (".csv", ".tsv"):
        return list(_table(text, path, kind))
    return _json_records(text, path)


def names_of(record: Iterable[str]) -> str:
    """The names of a record's fields, for a message."""
    names = [name if name.isprintable() and len(name) <= 40 else shown(name) for name in map(str, record)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return "the fields " + ", ".join(names[:20]) + more if names else "no fields"


# --- Text ---


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: cannot be unpacked ({_reason(error)})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or _reason(error)})") from None


def _text(path: Path) -> str:
    content = _bytes(path)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        name = encoding[:6].rstrip("-").upper()
        place = error.start + len(mark)
        raise ValueError(f"{path}: not a {name} text file ({error.reason} at byte {place})") from None
    if text.startswith("version https://git-lfs.github.com/spec/"):
        raise ValueError(f"{path}: a pointer of git-lfs, not the file itself: fetch it with 'git lfs pull'")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    r"""Lines with their places, blank ones left out. Only \n ends a line (with a \r before it): never U+2028 or FF."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip("\ufeff").strip():
            yield f"{path}, line {number}", line.removesuffix("\r").removeprefix("\ufeff")


# --- JSON ---


def _json(text: str, where: str, place: str = "line {error.lineno}, column {error.colno}") -> Any:
    """Content of a JSON text; numbers that Python cannot read as int or float exactly come as Decimal."""
    try:
        return json.loads(text, parse_int=_integer, parse_float=_real, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; if every line is a record, name the file .jsonl" if error.msg == "Extra data" and "\n" in text else ""
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {place.format(error=error)}){hint}") from None
    except RecursionError:
        raise ValueError(f"{where}: not read (lists or objects are nested too deeply)") from None


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < 400 else Decimal(digits)


def _real(digits: str) -> float | Decimal:
    """A float, or a Decimal where the float would be another number: a large whole one, or 0 for one that is not."""
    value = float(digits)
    if value != 0 and not 2**53 < abs(value) < math.inf:
        return value
    try:
        return Decimal(digits)
    except ArithmeticError:  # an exponent of twenty digits
        return math.inf


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = Record(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        record.twice = next(name for name in names if names.count(name) > 1)
    return record


def _json_records(text: str, path: Path) -> list[Placed]:
    content = _json(text, str(path))
    if isinstance(content, dict):
        key = next((key for key in LISTS if isinstance(content.get(key), list)), None)
        if key is not None:
            content = content[key]
        elif any(isinstance(content.get(name), str) for name in ("question", "prompt", "instruction", "problem")):
            content = [content]  # a single record
        else:
            columns = any(isinstance(value, dict | list) for value in content.values())
            hint = "; if these are columns, write records instead (pandas: orient='records')" if columns else ""
            raise ValueError(
                f'{path}: expected a list of records or an object with a list "prompts", '
                f"got an object with {names_of(content)}{hint}"
            )
        if key == "rows":  # as the viewer of the hub hands them out
            content = [row["row"] if isinstance(row, dict) and "row" in row else row for row in content]
    if not isinstance(content, list):
        name = "float" if isinstance(content, Decimal) else type(content).__name__
        raise ValueError(f"{path}: expected a list of records, got {name}")
    return [(f"{path}: record {number}", record) for number, record in enumerate(content, start=1)]


# --- Tables ---


def _table(text: str, path: Path, kind: str) -> Iterator[Placed]:
    """Rows of a table with a header; blank cells are missing values."""
    lines = [line + "\n" for line in text.split("\n")]
    header_line = next(line for line in lines if line.strip())
    delimiter = "\t" if kind == ".tsv" else ";" if ";" in header_line and "," not in header_line else ","
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}, line {first}: not a valid table ({_reason(error)})") from None
        if not any(cell.strip() for cell in row):
            continue
        if not header:
            header = [cell.strip() for cell in row]
            double = next((name for name in header if name and header.count(name) > 1), None)
            if double is not None:
                raise ValueError(f"{path}, line {first}: the header has {shown(double)} twice")
            continue
        number += 1
        where = f"{path}: record {number} (line {first})"
        if len(row) > len(header) and not any(cell.strip() for cell in row[len(header) :]):
            row = row[: len(header)]
        if len(row) != len(header):
            raise ValueError(f"{where} has {len(row)} cells, the header has {len(header)}")
        yield where, {name: cell if cell.strip() else None for name, cell in zip(header, row, strict=True) if name}


def _parquet(path: Path) -> list[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_reason(error)})") from None
    return [(f"{path}: record {number}", row) for number, row in enumerate(rows, start=1)]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
