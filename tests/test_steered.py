"""lm.steered: a grid of cells gives what one text under one cell gives alone, whatever is shared, for every rule of
positions; and the numbers of the published library (tests/golden/control)."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch
from conftest import LM_KINDS, make_tokenizer
from safetensors.torch import load_file
from steered_oracle import write
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from lm.edits import ResidualEdit
from lm.errors import UserError
from lm.generate import generate
from lm.load import load_lm
from lm.model import LanguageModel
from lm.steered import Cell, steer_cells
from lm.terms import EditPositions
from lm.text import left_padded

TEXTS = ["3+4=?", "Once upon a time there", "x", "x"]
RULES = get_args(EditPositions)
BOUND = {"atol": 3e-5, "rtol": 3e-5}
METHODS = ("reading", "contrastive", "pca_contrast", "pca_reading")


def vectors_for(model, n: int = 2, size: float = 2.0):
    generator = torch.Generator().manual_seed(3)
    return size * torch.randn(n, model.n_layers + 1, model.d_model, generator=generator)


def cells_for(model):
    return [
        Cell(1, 0, 1.0), Cell(model.n_layers, 1, -1.0), Cell(1, 1, 0.0), Cell(1, 1, 0.5), Cell(2, 0, -1.5),
        Cell(2, 0, 0.0), Cell(2, 1, 3.0),
    ]  # fmt: skip


def collect(found):
    """{(cell, text): (tokens, written text, finished, first logits, reference)}; each pair must come once."""
    rows = {}
    for chunk in found:
        for i in range(len(chunk)):
            key = int(chunk.cells[i]), int(chunk.rows[i])
            assert key not in rows
            first = None if chunk.first_logits is None else chunk.first_logits[i]
            reference = None if chunk.reference is None else chunk.reference[i]
            rows[key] = (chunk.tokens[i], chunk.texts[i], chunk.finished[i], first, reference)
    return rows


def ids_of(batch, row):
    return batch.input_ids[row][batch.attention_mask[row]].tolist()


def gemma(kind: str) -> LanguageModel:
    """Capped attention scores and logits (2), or layers with a window between full ones (3)."""
    given = {
        "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "sliding_window": 8,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma2Config(**given) if kind == "gemma2" else Gemma3TextConfig(**given)
    return LanguageModel(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32), make_tokenizer(False), name=kind
    )


# --- Against one text, one cell, no cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("positions", RULES)
@pytest.mark.parametrize("kind", (*LM_KINDS, "gemma2", "gemma3"))
def test_grid_is_one_by_one(language_model, kind, positions):
    """Every row as the oracle writes it, in chunks that cut through texts and cells, over shared and copied prompts."""
    model = language_model(kind) if kind in LM_KINDS else gemma(kind)
    batch, cells = model.encode(TEXTS), cells_for(model)
    vectors = vectors_for(model, size=30.0 if "gemma" in kind else 2.0)
    engines = ("clones",) if kind == "gemma2" else ("shared", "clones")
    grids = [
        collect(steer_cells(model, batch, vectors, cells, positions, max_new_tokens=4, end_ids=(), batch_size=7,
                            engine=engine, normalise=positions == "generated"))
        for engine in engines
    ]  # fmt: skip
    scores = collect(steer_cells(model, batch, vectors, cells, positions, batch_size=64))
    assert set(scores) == set(grids[0]) == {(c, t) for c in range(len(cells)) for t in range(len(TEXTS))}
    one = grids[0]
    for (c, t), (_, text, finished, first, reference) in scores.items():
        assert text == "" and not finished
        for grid in grids:
            assert grid[c, t][0] == one[c, t][0], (c, t)
            torch.testing.assert_close(grid[c, t][3], one[c, t][3], **BOUND)
            torch.testing.assert_close(grid[c, t][4], reference, **BOUND)
        if kind != "llama" and t != c % len(TEXTS):
            continue  # the oracle is slow: other kinds with every cell on one text
        cell, normalise = cells[c], positions == "generated"
        edit = (cell.layer, vectors[cell.vector, cell.layer], cell.coefficient, positions, normalise)
        tokens, expected = write(model.base, model.blocks, ids_of(batch, t), [edit] if cell.coefficient else [], 4)
        assert one[c, t][0] == tokens, (c, t)
        torch.testing.assert_close(one[c, t][3], expected, **BOUND)
        if positions != "generated":  # scored without the norms kept
            torch.testing.assert_close(first, expected, **BOUND)
    changed = sum(row[0] != one[2, t][0] for (_, t), row in one.items())
    assert changed > 3, "hardly any edit changes what is written"


@pytest.mark.parametrize("positions", RULES)
def test_zero_is_the_unsteered_model_bit_for_bit(language_model, positions):
    model = language_model()
    batch, cells = model.encode(TEXTS), cells_for(model)
    plain = generate(model, batch, 4, end_ids=(), batch_size=16, keep_first_logits=True)
    rows = collect(steer_cells(model, batch, vectors_for(model), cells, positions, max_new_tokens=4, end_ids=()))
    for (c, t), (tokens, text, finished, first, reference) in rows.items():
        assert torch.equal(reference, plain.first_logits[t])
        if cells[c].coefficient == 0:
            assert (tokens, text, finished) == (plain.tokens[t], plain.texts[t], plain.finished[t])
            assert torch.equal(first, reference)
        elif positions in ("all", "prompt", "last", "answer"):
            assert not torch.allclose(first, reference, atol=1e-3)
        else:
            assert torch.equal(first, reference) and tokens[0] == plain.tokens[t][0]


@pytest.mark.parametrize("positions", RULES)
def test_rows_that_finish_leave_and_stop_strings_cut(language_model, positions):
    """End tokens and stop strings as lm.generate has them; drawn tokens depend on seed and text, not on batches."""
    model = language_model()
    batch, cells, vectors = model.encode(TEXTS), cells_for(model), vectors_for(model, size=0.5)
    free = generate(model, batch, 8, end_ids=(), temperature=1.0, seed=9)
    ends = (free.tokens[0][0], free.tokens[1][2])
    stop = [chr(byte) for byte in range(ord("a"), ord("g"))]
    given = {"max_new_tokens": 8, "end_ids": ends, "temperature": 1.0, "seed": 9, "stop": stop}
    grids = [
        collect(steer_cells(model, batch, vectors, cells, positions, batch_size=size, **given)) for size in (4, 50)
    ]
    assert len({done for _, _, done, _, _ in grids[0].values()}) == 2
    for c, cell in enumerate(cells):
        edit = ResidualEdit(cell.layer, vectors[cell.vector, cell.layer], cell.coefficient, positions)
        expected = generate(model, batch, edits=edit, **given)
        for t in range(len(TEXTS)):
            for grid in grids:
                assert grid[c, t][:3] == (expected.tokens[t], expected.texts[t], expected.finished[t])


def test_chunks_are_no_larger_than_asked_for(language_model):
    model = language_model()
    batch, cells = model.encode(TEXTS * 3), cells_for(model)
    for positions in RULES:
        chunks = list(steer_cells(model, batch, vectors_for(model), cells, positions, batch_size=9, max_new_tokens=2))
        assert max(map(len, chunks)) <= 9 and sum(map(len, chunks)) == len(batch) * len(cells)
    quiet = next(steer_cells(model, batch, vectors_for(model), cells, keep_logits=False))
    assert quiet.first_logits is None and quiet.reference is None


def test_layers_below_and_shared_prompts_are_computed_once(language_model):
    """Tokens that go through each block: lower blocks see every text once; the last token alone goes on per row."""
    model = language_model()
    batch, vectors = model.encode(TEXTS), vectors_for(model)
    cells = [Cell(2, vector, c) for vector in (0, 1) for c in (-1.0, 0.5, 1.0)]
    seen = [0] * model.n_layers
    # transformers leaves hooks of its own where hidden states were once asked for
    before = [(list(one._forward_hooks), list(one._forward_pre_hooks)) for one in model.base.modules()]
    width = batch.input_ids.shape[1]

    def count(at):
        def hook(module, args, output):
            seen[at] += output.shape[0] * output.shape[1]

        return hook

    handles = [block.mlp.register_forward_hook(count(at)) for at, block in enumerate(model.blocks)]
    try:
        for positions, per_row in (("all", width), ("prompt", width), ("last", 1), ("generated", 0), ("once", 0)):
            seen[:] = [0] * model.n_layers
            rows = collect(steer_cells(model, batch, vectors, cells, positions))
            assert len(rows) == len(TEXTS) * len(cells)
            once = len(TEXTS) * width
            assert seen == [once, once, once + len(rows) * per_row]
    finally:
        for handle in handles:
            handle.remove()
    assert [(list(one._forward_hooks), list(one._forward_pre_hooks)) for one in model.base.modules()] == before
    assert model.attention == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_prompt_of_a_single_token(language_model, kind):
    """Nothing stands before the last token then; alone and beside a longer text."""
    model = language_model(kind)
    vectors, cells = vectors_for(model), [Cell(2, 0, 1.0)]
    for rows in ([[65]], [[65], [66, 67, 68]]):
        batch = left_padded(rows, 0)
        for positions in RULES:
            found = collect(steer_cells(model, batch, vectors, cells, positions, max_new_tokens=3, end_ids=()))
            tokens, first = write(model.base, model.blocks, [65], [(2, vectors[0, 2], 1.0, positions, False)], 3)
            assert found[0, 0][0] == tokens
            torch.testing.assert_close(found[0, 0][3], first, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": []}, "at least one cell"),
        ({"cells": [Cell(0, 0, 1.0)]}, r"layer of a cell must be in 1\.\.3, got 0"),
        ({"cells": [Cell(4, 0, 1.0)]}, r"layer of a cell must be in 1\.\.3, got 4"),
        ({"cells": [Cell(1, 2, 1.0)]}, r"vector of a cell must be in 0\.\.1, got 2"),
        ({"cells": [Cell(1, 0, float("nan"))]}, "coefficient of a cell must be a finite number"),
        ({"vectors": torch.zeros(2, 3, 32)}, r"vectors must be \(vector, 4, 32\), got \(2, 3, 32\)"),
        ({"vectors": torch.full((2, 4, 32), float("inf"))}, "vectors must be finite"),
        ({"positions": "first"}, "positions must be one of all, prompt, generated, last, once, answer, got 'first'"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 1 or more"),
        ({"temperature": 1.0, "max_new_tokens": 2}, "needs a seeded generator"),
        ({"max_new_tokens": 600}, "positions are needed"),
    ],
)
def test_grids_that_make_no_sense_are_refused(language_model, change, message):
    model = language_model()
    given = {"vectors": vectors_for(model), "cells": [Cell(1, 0, 1.0)], "positions": "all", **change}
    with pytest.raises(UserError, match=message) as caught:
        list(steer_cells(model, model.encode(TEXTS), **given))
    assert "\n" not in str(caught.value)


# --- The published library --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other_texts", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_golden_logits_and_tokens(golden_root, kind, other_texts):
    """Steered next-token logits and greedy tokens of all methods and coefficients, within 1e-4 of the largest logit,
    also in a left-padded batch with other texts."""
    folder = golden_root / "control" / kind
    model = load_lm(str(folder / "model"), form="plain")
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "expected.safetensors")
    prompts, layer = expected["prompts"], expected["steered_block"] + 1
    others = ["Then", prompts[0] + " and then, John and Mary went to the store"] if other_texts else []
    batch = model.encode([*prompts, *others])
    if other_texts:
        assert bool((~batch.attention_mask[: len(prompts)]).any(dim=1).all()), "nothing is padded"
    vectors = torch.zeros(len(METHODS), model.n_layers + 1, model.d_model)
    for i, method in enumerate(METHODS):
        for block in range(model.n_layers):
            vectors[i, block + 1] = tensors[f"{method}.{block}"]
    cells = [Cell(layer, i, c) for i in range(len(METHODS)) for c in (0.0, -1.0, 0.5, 1.0)]
    rows = collect(steer_cells(model, batch, vectors, cells, max_new_tokens=5, end_ids=()))
    compared = 0
    for (c, t), (tokens, _, _, first, reference) in rows.items():
        if t >= len(prompts):
            continue
        name = f"{METHODS[cells[c].vector]}.{cells[c].coefficient}"
        _close(reference, tensors["logits.none"][t])
        _close(first, tensors["logits.none" if cells[c].coefficient == 0 else f"logits.{name}"][t])
        if f"greedy.{name}" in tensors:
            assert tokens == tensors[f"greedy.{name}"][t].tolist()
            compared += 1
    assert compared == 3 * len(METHODS) * len(prompts)
    normalised = collect(steer_cells(model, batch, vectors, cells, normalise=True))
    cell = cells.index(Cell(layer, METHODS.index("contrastive"), 1.0))
    for t in range(len(prompts)):
        _close(normalised[cell, t][3], tensors["logits.contrastive.1.0.normalized"][t])


def _close(found, expected):
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
