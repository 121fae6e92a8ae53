"""Checkpoints of what was trained alone: with their base they are the whole one, and another base is noticed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from codi import CodiModel, load_codi
from codi.checkpoint import reference_state
from codi.trained import TRAINED_FILE, Base, base_hash, save_trained

QUESTIONS = ["3+4=?", "Tom has 12 pens and buys 30 more. How many pens?"]


@pytest.fixture(params=[("llama", "answer-only"), ("gpt2", "original"), ("mistral", "original-eos")])
def pair(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tiny_model: Callable[..., Any], tmp_path: Path
) -> tuple[CodiModel, Path]:
    """A model whose LoRA is apart, and the folder of what was trained beside a copy of its base."""
    kind, family = request.param
    shutil.copytree(tiny_checkpoint(kind, family) / "base", tmp_path / "base")
    model = tiny_model(kind, family, merge_lora=False)
    base = Base(str(tmp_path / "base"), base_hash(tmp_path / "base"), 258, "float32")
    settings = {"lora_r": 4, "lora_alpha": 2.0, "n_latents": 3, "prj_dim": 24}
    return model, save_trained(tmp_path / "trained", reference_state(model), base, model.protocol, settings)


def test_with_its_base_it_is_the_whole_checkpoint(pair: tuple[CodiModel, Path]) -> None:
    model, folder = pair
    assert sorted(path.name for path in folder.iterdir()) == ["codi.json", TRAINED_FILE]
    assert json.loads((folder / "codi.json").read_text())["base"] == "../base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_codi(folder, merge_lora=False)
    assert loaded.n_latents == 3 and loaded.protocol == model.protocol
    assert loaded.encode(QUESTIONS).input_ids.tolist() == model.encode(QUESTIONS).input_ids.tolist()
    one, two = reference_state(model), reference_state(loaded)
    assert one.keys() == two.keys()
    for name, value in one.items():
        rounded = name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
        want = value.to(torch.bfloat16).float() if rounded else value
        got = two[name]
        if len(value) == 261:  # the rows of new tokens are rounded too
            torch.testing.assert_close(got[:258], want[:258], rtol=0, atol=0)
            want, got = want[258:].to(torch.bfloat16).float(), got[258:]
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)
    merged = load_codi(folder)
    assert merged.answer(QUESTIONS, max_new_tokens=4) == loaded.answer(QUESTIONS, max_new_tokens=4)
    assert merged.checkpoint_hash != base_hash(folder.parent / "base")


def test_it_holds_no_weight_of_the_base(pair: tuple[CodiModel, Path]) -> None:
    state = load_file(pair[1] / TRAINED_FILE)
    assert all(".lora_" in key or key.startswith(("prj.", "new_rows.")) for key in state)
    assert all(len(value) == 3 for key, value in state.items() if key.startswith("new_rows."))


def test_another_base_is_noticed(pair: tuple[CodiModel, Path]) -> None:
    folder = pair[1]
    place = folder.parent / "base" / "model.safetensors"
    state = load_file(place)
    save_file({key: value * 1.01 for key, value in state.items()}, place, {"format": "pt"})
    with pytest.warns(UserWarning, match="was trained on other weights than those of .*base"):
        load_codi(folder)


def test_what_is_wrong_is_said_in_a_line(pair: tuple[CodiModel, Path], tmp_path: Path) -> None:
    model, folder = pair
    state = load_file(folder / TRAINED_FILE)

    def changed(name: str, more: dict[str, Any]) -> Path:
        shutil.copytree(folder, tmp_path / name)
        save_file({**state, **more}, tmp_path / name / TRAINED_FILE)
        return tmp_path / name

    with pytest.raises(ValueError, match="has no model.nothing.weight, to which .* adds rows"):
        load_codi(changed("rows", {"new_rows.model.nothing.weight": torch.zeros(3, 32)}))
    with pytest.raises(ValueError, match="1 unexpected: more"):
        load_codi(changed("more", {"more": torch.zeros(2)}))
    settings = json.loads((folder / "codi.json").read_text())
    shutil.copytree(folder, tmp_path / "away")
    (tmp_path / "away" / "codi.json").write_text(json.dumps({**settings, "base": "../smollm2"}))
    with pytest.raises(ValueError, match="make smollm2"):
        load_codi(tmp_path / "away")
    if "tokens" in settings:
        (tmp_path / "away" / "codi.json").write_text(json.dumps({**settings, "tokens": {"[PAD]": 1}}))
        with pytest.raises(ValueError, match="tokens must give ids to"):
            load_codi(tmp_path / "away")
    with pytest.raises(ValueError, match="nothing to save"):
        save_trained(tmp_path / "x", {"prj.1.weight": torch.zeros(2, 2)}, Base("b", "", 1), model.protocol, {})
