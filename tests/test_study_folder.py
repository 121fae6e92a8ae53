"""The run folder: whole files only, resume, damage, mismatch, other commands, locks and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from experiments.study.edits.trials import SORT_COLUMNS, TRIAL_SCHEMA, read_trials
from experiments.study.folder import RunFolder, differences, fingerprint, open_run
from experiments.study.manifest import check_out

DATA = Path(__file__).parent / "data"
IDENTITY = {"options": {"seed": 0, "pairs": [[1, 2]]}, "checkpoint_hash": "abc"}


def rows(n: int, first: int = 0, space: str = "kv") -> dict[str, np.ndarray]:
    numbers = np.arange(first, first + n)
    text = np.array([str(number % 7) for number in numbers])
    return {
        "space": np.full(n, space),
        "part": np.full(n, "both"),
        "timing": np.full(n, "early-exit"),
        "source": np.full(n, 1),
        "target": np.full(n, 2),
        "coefficient": np.where(numbers % 2, 0.5, -0.5),
        "control": np.full(n, "direction"),
        "draw": np.full(n, -1),
        "latent": numbers % 6 + 1,
        "n_latents": numbers % 6 + 1,
        "prompt_id": np.array([f"p{number:05d}" for number in numbers]),
        "cluster": text,
        "template": text,
        "operation": text,
        "answer": numbers.astype(float),
        "prediction": np.where(numbers % 3, numbers, np.nan),
        "text": text,
        "correct": numbers % 3 > 0,
        "parsed": numbers % 3 > 0,
        "applied_norm": numbers / 7,
        "first_token": numbers,
    }


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_parts_come_back_sorted_and_typed(folder):
    with folder.open(IDENTITY, {}) as known:
        assert not known
        folder.write_part("b", rows(50, 0, "kv"), TRIAL_SCHEMA)
        folder.write_part("a", rows(30, 100, "embedding"), TRIAL_SCHEMA)
    table = read_trials(folder)
    assert list(table.columns) == TRIAL_SCHEMA.names and len(table) == 80
    keys = [tuple(row) for row in table[list(SORT_COLUMNS)].astype(object).itertuples(index=False)]
    assert keys == sorted(keys) and table["space"].iloc[0] == "embedding"
    assert table["prediction"].isna().sum() == (table["answer"] % 3 == 0).sum() > 0
    # another order of the parts, the same table
    other = RunFolder(folder.path.with_name("other"))
    with other.open(IDENTITY, {}):
        other.write_part("0", rows(30, 100, "embedding"), TRIAL_SCHEMA)
        other.write_part("1", rows(25, 25, "kv"), TRIAL_SCHEMA)
        other.write_part("2", rows(25, 0, "kv"), TRIAL_SCHEMA)
    assert read_trials(other).equals(table)


def test_manifest(folder):
    with folder.open(IDENTITY, {"started": "today"}):
        folder.add_to_manifest(finished="later")
    manifest = folder.manifest()
    assert manifest["identity"] == IDENTITY and manifest["started"] == "today" and manifest["finished"] == "later"
    assert manifest["fingerprint"] == fingerprint(dict(reversed(IDENTITY.items())))
    with folder.open(IDENTITY, {"started": "again"}) as known:
        assert known
    assert folder.manifest()["started"] == "today"


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "missing", "text"])
def test_damaged_parts_are_detected(folder, damage):
    with folder.open(IDENTITY, {}):
        path = folder.write_part("x", rows(4000), TRIAL_SCHEMA)
        assert folder.has_part("x", TRIAL_SCHEMA, 4000) and not folder.has_part("x", TRIAL_SCHEMA, 3999)
        assert not folder.has_part("y", TRIAL_SCHEMA, 4000)
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "flip":
            path.write_bytes(content[:2000] + bytes([content[2000] ^ 0xFF]) + content[2001:])
        else:
            path.write_bytes(
                {"truncate": content[: len(content) * 2 // 3], "empty": b"", "text": b"not a table"}[damage]
            )
        assert not folder.has_part("x", TRIAL_SCHEMA, 4000)
        if damage != "missing":
            with pytest.raises(ValueError, match="part-x.parquet is damaged"):
                read_trials(folder)
        folder.write_part("x", rows(4000), TRIAL_SCHEMA)
        assert folder.has_part("x", TRIAL_SCHEMA, 4000)


def test_every_flipped_byte_is_noticed_or_harmless(folder):
    """Pages carry checksums: no change of one byte gives a table that reads well and is another one."""
    with folder.open(IDENTITY, {}):
        path = folder.write_part("x", rows(300), TRIAL_SCHEMA)
        content, expected = path.read_bytes(), read_trials(folder)
        noticed = 0
        for place in range(0, len(content), 97):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
            if not folder.has_part("x", TRIAL_SCHEMA, 300):
                noticed += 1
            else:
                assert read_trials(folder).equals(expected)
        assert noticed > 20


def test_a_part_of_another_run_does_not_count(folder, tmp_path):
    other = RunFolder(tmp_path / "other")
    with other.open({**IDENTITY, "checkpoint_hash": "xyz"}, {}):
        foreign = other.write_part("x", rows(10), TRIAL_SCHEMA).read_bytes()
    with folder.open(IDENTITY, {}):
        folder.write_part("y", rows(1), TRIAL_SCHEMA)
        folder.part_path("x").write_bytes(foreign)
        assert not folder.has_part("x", TRIAL_SCHEMA, 10)


def test_other_options_are_refused_with_the_difference(folder):
    with folder.open(IDENTITY, {}):
        folder.write_part("x", rows(10), TRIAL_SCHEMA)
    other = {"options": {"seed": 1, "pairs": [[1, 2]]}, "checkpoint_hash": "abc"}
    with pytest.raises(ValueError, match=r"other options.*options\.seed: 0 -> 1") as caught, folder.open(other, {}):
        raise AssertionError("opened")
    assert "pairs" not in str(caught.value) and "\n" not in str(caught.value)
    with folder.open(IDENTITY, {}):
        assert folder.has_part("x", TRIAL_SCHEMA, 10)


def test_a_part_with_other_columns_counts_as_missing(folder):
    """A study that writes other columns today than when the run was made computes its parts anew."""
    narrow = TRIAL_SCHEMA.remove(TRIAL_SCHEMA.get_field_index("first_token"))
    wider_type = TRIAL_SCHEMA.set(TRIAL_SCHEMA.get_field_index("draw"), pa.field("draw", pa.int64()))
    with folder.open(IDENTITY, {}):
        folder.write_part("x", rows(10), TRIAL_SCHEMA)
        assert folder.has_part("x", TRIAL_SCHEMA) and folder.has_part("x", None)
        assert not folder.has_part("x", narrow) and not folder.has_part("x", wider_type)
        with pytest.raises(ValueError, match="part x: 'first_token' is not in its schema"):
            folder.write_part("x", rows(10), narrow)
        with pytest.raises(ValueError, match="part x: no 'first_token'"):
            folder.write_part("x", {name: rows(10)[name] for name in narrow.names}, TRIAL_SCHEMA)
        with pytest.raises(ValueError, match="part x, column latent"):
            folder.write_part("x", {**rows(10), "latent": np.full(10, 99_999)}, TRIAL_SCHEMA)
        assert folder.has_part("x", TRIAL_SCHEMA, 10)  # what was refused has changed nothing
        folder.write_part("y", pd.DataFrame({"a": [1.5], "b": ["text"]}))
        assert folder.read_parts(["y"]).to_dict("list") == {"a": [1.5], "b": ["text"]}


@pytest.mark.parametrize("now", [{"study": "patch"}, {"command": "lens detect"}])
@pytest.mark.parametrize("manifest", ["sweep", "necessity"])
def test_a_folder_of_another_command_is_refused_in_one_line(folder, manifest, now):
    folder.path.mkdir()
    content = (DATA / f"manifest_{manifest}.json").read_bytes()
    folder.manifest_path.write_bytes(content)
    with pytest.raises(ValueError) as caught, folder.open({**now, "options": {"seed": 3}}, {}):
        raise AssertionError("opened")
    name = next(iter(now.values()))
    assert str(caught.value) == (
        f"{folder.path} is a run of `codi {manifest}`, not of `codi {name}`; choose another --out"
    )
    assert folder.manifest_path.read_bytes() == content


def test_a_run_without_trials(tmp_path):
    said: list[str] = []
    identity = {"study": "eval", "options": {"seed": 0}}
    for _ in range(2):
        with open_run(tmp_path / "run", identity, model="m", about="3 prompts", say=said.append) as folder:
            folder.write_table("accuracy", pd.DataFrame({"a": [1]}))
    assert said == ["starting eval: m, 3 prompts", "continuing eval: m, 3 prompts"]
    assert sorted(path.name for path in folder.path.iterdir()) == [".lock", "accuracy.csv", "manifest.json"]
    manifest = folder.manifest()
    assert manifest["identity"] == identity and manifest["model"] == "m" and len(manifest["sittings"]) == 2
    assert manifest["versions"]["python"]


def test_a_folder_is_refused_before_anything_is_loaded(tmp_path):
    """By its manifest alone: another command, or options that differ."""
    content = (DATA / "manifest_necessity.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content)
    options = json.loads(content)["identity"]["options"]
    check_out(tmp_path, "necessity", options)
    check_out(tmp_path / "new", "necessity", options)
    with pytest.raises(ValueError, match=r"other options.*options\.seed: 0 -> 1"):
        check_out(tmp_path, "necessity", {**options, "seed": 1})
    with pytest.raises(ValueError, match="is a run of `codi necessity`, not of `codi patch`"):
        check_out(tmp_path, "patch", options)


def test_differences():
    assert differences({"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2]}}) == [
        "b.c: [1] -> [2]",
        "b.d: 2 -> not given",
    ]
    assert differences(IDENTITY, IDENTITY) == []


def test_folders_that_are_no_run_folders(folder, tmp_path):
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="not empty and not a run folder"), folder.open(IDENTITY, {}):
        pass
    assert (folder.path / "thesis.tex").read_text() == "…"
    orphaned = RunFolder(tmp_path / "orphaned")  # parts without the manifest that says whose they are
    with orphaned.open(IDENTITY, {}):
        orphaned.write_part("x", rows(3), TRIAL_SCHEMA)
    orphaned.manifest_path.unlink()
    with pytest.raises(ValueError, match="not empty and not a run folder"), orphaned.open(IDENTITY, {}):
        pass
    orphaned.part_path("x").rename(orphaned.path / "manifest.json.77.partial")  # killed while writing the manifest
    with orphaned.open(IDENTITY, {}) as known:
        assert not known and not list(orphaned.path.rglob("*.partial"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"), RunFolder(file).open(IDENTITY, {}):
        pass
    with pytest.raises(ValueError, match="no manifest.json"):
        RunFolder(tmp_path / "nowhere").manifest()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": 3}'])
def test_damaged_manifest(folder, content):
    folder.path.mkdir()
    folder.manifest_path.write_text(content)
    with pytest.raises(ValueError, match="damaged"), folder.open(IDENTITY, {}):
        pass


def test_two_processes(folder):
    with folder.open(IDENTITY, {}):
        with pytest.raises(ValueError, match="another process is writing"), RunFolder(folder.path).open(IDENTITY, {}):
            pass
    with RunFolder(folder.path).open(IDENTITY, {}) as known:
        assert known


@pytest.mark.parametrize(
    "number, message", [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "same command goes on")]
)
def test_disk_that_refuses_a_file(folder, monkeypatch, number, message):
    with folder.open(IDENTITY, {}):
        folder.write_part("kept", rows(10), TRIAL_SCHEMA)
        before = sorted(path.name for path in folder.path.rglob("*"))

        def refuse(handle):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match=message) as caught:
                folder.write_part("lost", rows(10), TRIAL_SCHEMA)
        assert "\n" not in str(caught.value) and str(folder.path) in str(caught.value)
        assert sorted(path.name for path in folder.path.rglob("*")) == before  # no temporary file, nothing lost
        assert folder.has_part("kept", TRIAL_SCHEMA, 10)
        folder.write_part("lost", rows(10), TRIAL_SCHEMA)
    assert len(read_trials(folder)) == 20


def test_read_only_folder(tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root may write anywhere: let the system refuse as it would refuse others

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="read-only or belongs to somebody else"):
        with RunFolder(tmp_path / "run").open(IDENTITY, {}):
            pass
    tmp_path.chmod(0o700)


def test_killed_while_writing(folder):
    """kill -9 at random moments of a process that writes one part after another: every part is whole or not there."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                with folder.open(IDENTITY, {}):
                    for number in range(1000):
                        if not folder.has_part(str(number), TRIAL_SCHEMA, 2000):
                            folder.write_part(str(number), rows(2000, 2000 * number), TRIAL_SCHEMA)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.25 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder.fingerprint = fingerprint(IDENTITY)
        parts = list((folder.path / "trials").glob("part-*.parquet")) if folder.path.exists() else []
        assert all(folder.has_part(path.stem.removeprefix("part-"), TRIAL_SCHEMA, 2000) for path in parts)
        seen = max(seen, len(parts))
    assert seen > 3
    with folder.open(IDENTITY, {}) as known:  # the lock went with the process, leftovers are gone
        assert known and not list(folder.path.rglob("*.partial"))
    assert json.loads(folder.manifest_path.read_text())["identity"] == IDENTITY
