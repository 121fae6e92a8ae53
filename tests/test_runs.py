"""experiments.study.folder: whole files only, resume, damage, mismatch, locks and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import signal
import time

import numpy as np
import pytest

from experiments.study.folder import SORT_COLUMNS, TRIAL_SCHEMA, RunFolder, differences, fingerprint

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
        folder.write_part("b", rows(50, 0, "kv"))
        folder.write_part("a", rows(30, 100, "embedding"))
    table = folder.trials()
    assert list(table.columns) == TRIAL_SCHEMA.names and len(table) == 80
    keys = [tuple(row) for row in table[list(SORT_COLUMNS)].astype(object).itertuples(index=False)]
    assert keys == sorted(keys) and table["space"].iloc[0] == "embedding"
    assert table["prediction"].isna().sum() == (table["answer"] % 3 == 0).sum() > 0
    # another order of the parts, the same table
    other = RunFolder(folder.path.with_name("other"))
    with other.open(IDENTITY, {}):
        other.write_part("0", rows(30, 100, "embedding"))
        other.write_part("1", rows(25, 25, "kv"))
        other.write_part("2", rows(25, 0, "kv"))
    assert other.trials().equals(table)


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
        path = folder.write_part("x", rows(4000))
        assert folder.has_part("x", 4000) and not folder.has_part("x", 3999) and not folder.has_part("y", 4000)
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "flip":
            path.write_bytes(content[:2000] + bytes([content[2000] ^ 0xFF]) + content[2001:])
        else:
            path.write_bytes(
                {"truncate": content[: len(content) * 2 // 3], "empty": b"", "text": b"not a table"}[damage]
            )
        assert not folder.has_part("x", 4000)
        if damage != "missing":
            with pytest.raises(ValueError, match="part-x.parquet is damaged"):
                folder.trials()
        folder.write_part("x", rows(4000))
        assert folder.has_part("x", 4000)


def test_every_flipped_byte_is_noticed_or_harmless(folder):
    """Pages carry checksums: no change of one byte gives a table that reads well and is another one."""
    with folder.open(IDENTITY, {}):
        path = folder.write_part("x", rows(300))
        content, expected = path.read_bytes(), folder.trials()
        noticed = 0
        for place in range(0, len(content), 97):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
            if not folder.has_part("x", 300):
                noticed += 1
            else:
                assert folder.trials().equals(expected)
        assert noticed > 20


def test_a_part_of_another_run_does_not_count(folder, tmp_path):
    other = RunFolder(tmp_path / "other")
    with other.open({**IDENTITY, "checkpoint_hash": "xyz"}, {}):
        foreign = other.write_part("x", rows(10)).read_bytes()
    with folder.open(IDENTITY, {}):
        folder.part_path("x").write_bytes(foreign)
        assert not folder.has_part("x", 10)


def test_other_options_are_refused_with_the_difference(folder):
    with folder.open(IDENTITY, {}):
        folder.write_part("x", rows(10))
    other = {"options": {"seed": 1, "pairs": [[1, 2]]}, "checkpoint_hash": "abc"}
    with pytest.raises(ValueError, match=r"other options.*options\.seed: 0 -> 1") as caught, folder.open(other, {}):
        raise AssertionError("opened")
    assert "pairs" not in str(caught.value) and "\n" not in str(caught.value)
    with folder.open(IDENTITY, {}):
        assert folder.has_part("x", 10)


def test_differences():
    assert differences({"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2]}}) == [
        "b.c: [1] -> [2]",
        "b.d: 2 -> null",
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
        orphaned.write_part("x", rows(3))
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
        folder.write_part("kept", rows(10))
        before = sorted(path.name for path in folder.path.rglob("*"))

        def refuse(handle):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match=message) as caught:
                folder.write_part("lost", rows(10))
        assert "\n" not in str(caught.value) and str(folder.path) in str(caught.value)
        assert sorted(path.name for path in folder.path.rglob("*")) == before  # no temporary file, nothing lost
        assert folder.has_part("kept", 10)
        folder.write_part("lost", rows(10))
    assert len(folder.trials()) == 20


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
                        if not folder.has_part(str(number), 2000):
                            folder.write_part(str(number), rows(2000, 2000 * number))
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.25 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        folder.fingerprint = fingerprint(IDENTITY)
        parts = list((folder.path / "trials").glob("part-*.parquet")) if folder.path.exists() else []
        assert all(folder.has_part(path.stem.removeprefix("part-"), 2000) for path in parts)
        seen = max(seen, len(parts))
    assert seen > 3
    with folder.open(IDENTITY, {}) as known:  # the lock went with the process, leftovers are gone
        assert known and not list(folder.path.rglob("*.partial"))
    assert json.loads(folder.manifest_path.read_text())["identity"] == IDENTITY
