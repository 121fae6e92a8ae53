"""How fast is the grid of steering? Rows per second of two ways to score the same texts under the same edits.

(a) published   batches of 16; for every vector and alpha a whole forward pass with the unsteered one again beside it,
                logits at every position (a loop as the code of Højer et al. 2025 runs it)
(b) ours        lm.steered: the unsteered pass once per text, blocks below the edited layer once for all cells, a prompt
                that is not edited shared by all rows, logits only where they are read

for SmolLM2 (checkpoints/smollm2; a random model of its shape where that is missing) and indirect-object sentences, in
one process, the ways taking turns; (a) on a sample of the cells. A row's numbers are KL(unsteered ‖ steered), its most
probable token and, where texts are written, its tokens; they are compared. Five tables: 21 alphas at the middle layer;
the same with texts written; all layers × 21 alphas; the last prompt token only; generated tokens only. Prints them, and
the matrix FLOP/s of (b) as a fraction of what a plain large matmul reaches; writes benchmarks/results/steered.json.
Knows nothing about accuracy::

    python -m benchmarks.steered                                  # some minutes on two CPU cores
    python -m benchmarks.steered --texts 16 --threads 1 --only middle,last --dtypes bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.branches import clock, matmul_peak
from lm.edits import ResidualEdit, edited
from lm.load import load_lm
from lm.model import LanguageModel
from lm.steered import Cell, steer_cells
from lm.terms import EditPositions
from lm.text import EncodedBatch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "steered.json"
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
SHAPE: dict[str, Any] = {
    "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49152,
}  # fmt: skip
ALPHAS = [round(-1 + 0.1 * step, 1) for step in range(21)]
BATCH = 16
"""Texts at once in the published loop."""


@dataclass(frozen=True)
class Table:
    """One comparison: layers as shares of the depth (None: all), positions, tokens to write, cells of the sample."""

    title: str
    positions: EditPositions
    layers: tuple[float, ...] | None = (0.5,)
    new_tokens: int = 0
    sampled: int = 3


TABLES = {
    "middle": Table("21 alphas at the middle layer, next token", "all"),
    "written": Table("21 alphas at the middle layer, 10 tokens written", "all", new_tokens=10, sampled=2),
    "layers": Table("all layers x 21 alphas, next token", "all", layers=None),
    "last": Table("21 alphas at the middle layer, last prompt token only", "last"),
    "generated": Table("21 alphas at the middle layer, generated tokens only, 10 written", "generated", new_tokens=10,
                       sampled=2),
}  # fmt: skip


# --- Model, texts, cells ----------------------------------------------------------------------------------------------


def make_model(name: str, device: str, dtype: str) -> LanguageModel:
    """SmolLM2, or a random Llama of its shape if it is not there."""
    if Path(name).exists():
        return load_lm(name, device=device, dtype=dtype, form="plain", check=False)  # type: ignore[arg-type]
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, max_position_embeddings=2048, eos_token_id=0)
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return LanguageModel(base.to(device), name="random, SmolLM2's shape")


def make_texts(model: LanguageModel, n: int) -> EncodedBatch:
    """Indirect-object sentences; random tokens of their lengths for a model without a tokenizer."""
    from experiments.tasks import indirect_objects

    if model.tokenizer is not None:
        words = indirect_objects.words_for(model.tokenizer)
        items = indirect_objects.generate(n, "AL", seed=0, words=words)
        return model.encode([item.question for item in items])
    ids = torch.randint(0, model.vocab_size, (n, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(n, 30, dtype=torch.bool)
    for row in range(n):
        mask[row, : row % 6] = False
    return EncodedBatch(ids, mask).to(model.device)


@torch.no_grad()
def make_vectors(model: LanguageModel, batch: EncodedBatch) -> Tensor:
    """(1, n_layers + 1, d_model) random directions, half as long as the residual stream of the texts is."""
    from lm.residual import mean_residual

    norms = mean_residual(model, batch).norm(dim=-1, keepdim=True).float()
    directions = torch.randn(norms.shape[0], model.d_model, generator=torch.Generator().manual_seed(1))
    return (0.5 * norms * directions / directions.norm(dim=-1, keepdim=True))[None]


# --- The two ways -----------------------------------------------------------------------------------------------------


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """(row,) KL(reference ‖ logits) in nats."""
    p, q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


Numbers = dict[tuple[int, int], tuple[float, int, list[int]]]
"""(cell, text) -> KL, most probable token, tokens written."""


@torch.no_grad()
def published(
    model: LanguageModel, batch: EncodedBatch, vectors: Tensor, cells: dict[int, Cell], table: Table
) -> Numbers:
    """Cell by cell, 16 texts at once, everything anew."""
    found: Numbers = {}
    for index, cell in cells.items():
        edit = ResidualEdit(cell.layer, vectors[cell.vector, cell.layer], cell.coefficient, table.positions)
        for start in range(0, len(batch), BATCH):
            part = batch.select(range(start, min(start + BATCH, len(batch))))
            width = int(part.lengths.max())
            ids, mask = part.input_ids[:, -width:], part.attention_mask[:, -width:]
            given = {"input_ids": ids, "attention_mask": mask.long()}
            reference = model.base(**given).logits[:, -1]
            with edited(model, edit):
                logits = model.base(**given).logits[:, -1]
                written: list[list[int]] = [[] for _ in ids]
                if table.new_tokens:
                    written = model.base.generate(
                        **given, max_new_tokens=table.new_tokens, do_sample=False, pad_token_id=0
                    )[:, width:].tolist()
            kl, top = divergence(reference, logits).tolist(), logits.argmax(-1).tolist()
            for row in range(len(ids)):
                found[index, start + row] = (kl[row], top[row], _before_end(written[row], model))
    return found


def _before_end(tokens: list[int], model: LanguageModel) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in model.end_ids]
    return tokens[: ends[0]] if ends else tokens


@torch.no_grad()
def ours(
    model: LanguageModel, batch: EncodedBatch, vectors: Tensor, cells: Sequence[Cell], table: Table, batch_size: int
) -> Numbers:
    """The whole grid."""
    found: Numbers = {}
    chunks = steer_cells(
        model, batch, vectors, cells, table.positions, max_new_tokens=table.new_tokens, batch_size=batch_size
    )
    for chunk in chunks:
        assert chunk.first_logits is not None and chunk.reference is not None
        kl, top = divergence(chunk.reference, chunk.first_logits).tolist(), chunk.first_logits.argmax(-1).tolist()
        keys = zip(chunk.cells.tolist(), chunk.rows.tolist(), strict=True)
        found |= {key: (kl[i], top[i], chunk.tokens[i]) for i, key in enumerate(keys)}
    return found


def needed_flops(
    model: LanguageModel, batch: EncodedBatch, cells: Sequence[Cell], table: Table, found: Numbers
) -> float:
    """Matrix FLOPs that (b) cannot do without: attention, padding and whatever else it computes in vain left out."""
    decoder = sum(p.numel() for name, p in model.decoder.named_parameters() if p.dim() == 2 and "embed" not in name)
    block, vocabulary = decoder / model.n_layers, model.vocab_size * model.d_model
    lengths = batch.lengths.tolist()
    flops = 2.0 * (decoder * sum(lengths) + vocabulary * len(lengths))
    for (index, text), (_, _, tokens) in found.items():
        cell = cells[index]
        if cell.coefficient == 0:
            continue
        above = {"all": lengths[text], "prompt": lengths[text], "last": 1}.get(table.positions, 0)
        flops += 2.0 * block * (model.n_layers - cell.layer) * above
        flops += 2.0 * vocabulary * (above > 0)
        flops += 2.0 * (decoder + vocabulary) * max(min(len(tokens) + 1, table.new_tokens) - 1, 0)
    return flops


# --- Measuring --------------------------------------------------------------------------------------------------------


def compare(
    model: LanguageModel, batch: EncodedBatch, vectors: Tensor, table: Table, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Both ways in turns, the least time of each; and whether their numbers agree."""
    depth = model.n_layers
    layers = range(1, depth + 1) if table.layers is None else [max(1, round(share * depth)) for share in table.layers]
    cells = [Cell(layer, 0, alpha) for layer in layers for alpha in ALPHAS]
    others = [i for i, cell in enumerate(cells) if cell.coefficient]
    step = max(1, len(others) // table.sampled)
    sample = {i: cells[i] for i in others[step // 2 :: step][: table.sampled]}
    device, first = model.device, batch.select(range(min(4, len(batch))))
    published(model, first, vectors, dict(list(sample.items())[:1]), table)  # warm up
    ours(model, first, vectors, cells[:2], table, batch_size)
    seconds = {"published": float("inf"), "ours": float("inf")}
    for _ in range(rounds):
        once, slow = clock(lambda: published(model, batch, vectors, sample, table), device)
        seconds["published"] = min(seconds["published"], once)
        once, fast = clock(lambda: ours(model, batch, vectors, cells, table, batch_size), device)
        seconds["ours"] = min(seconds["ours"], once)
    rates = {"published": len(slow) / seconds["published"], "ours": len(fast) / seconds["ours"]}
    far = max(abs(fast[key][0] - kl) for key, (kl, _, _) in slow.items())
    same = sum(fast[key][1:] == row[1:] for key, row in slow.items()) / len(slow)
    flops, peak = needed_flops(model, batch, cells, table, fast), matmul_peak(device, model.dtype)
    return {
        "title": table.title, "dtype": str(model.dtype).removeprefix("torch."), "texts": len(batch),
        "tokens_per_text": float(batch.lengths.double().mean()), "cells": len(cells), "batch_size": batch_size,
        "rows_per_second": rates, "times_published": rates["ours"] / rates["published"], "seconds": seconds["ours"],
        "largest_difference_of_kl": far, "same_tokens": same,
        "median_kl": float(torch.tensor([kl for kl, _, _ in slow.values()]).median()),
        "matmul_peak_gflops": peak / 1e9, "matrix_gflops": flops / seconds["ours"] / 1e9,
        "fraction_of_peak": flops / seconds["ours"] / peak,
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """A comparison as text."""
    rates = result["rows_per_second"]
    return (
        f"{result['title']} ({result['dtype']}, {result['texts']} texts of {result['tokens_per_text']:.0f} tokens)\n"
        f"  {rates['ours']:,.1f} rows/s against {rates['published']:,.1f}: {result['times_published']:.1f} x; "
        f"all {result['cells']} cells in {result['seconds']:.1f} s\n"
        f"  same tokens {result['same_tokens']:.1%}, KL within {result['largest_difference_of_kl']:.1e} nats "
        f"(median {result['median_kl']:.2f})\n"
        f"  {result['matrix_gflops']:,.0f} of {result['matmul_peak_gflops']:,.0f} GFLOP/s "
        f"({result['fraction_of_peak']:.0%} of a plain matmul)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steered", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(SMOLLM2), help="as load_lm takes it (default: checkpoints/smollm2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="dtypes, comma separated")
    parser.add_argument("--texts", type=int, default=32, help="texts (all layers: half of them)")
    parser.add_argument("--batch-size", type=int, default=64, help="rows at once in our way")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way (all layers: 1)")
    parser.add_argument("--only", default=",".join(TABLES), help=f"of {', '.join(TABLES)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    unknown = set(options.only.split(",")) - set(TABLES)
    if unknown:
        parser.error(f"unknown table {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "comparisons": [],
    }
    start = time.perf_counter()
    for dtype in options.dtypes.split(","):
        model = make_model(options.model, options.device, dtype)
        batch = make_texts(model, options.texts)
        vectors = make_vectors(model, batch)
        for name in options.only.split(","):
            table = TABLES[name]
            every = table.layers is None
            texts = batch.select(range(max(1, options.texts // 2))) if every else batch
            result = compare(model, texts, vectors, table, options.batch_size, 1 if every else options.rounds)
            results["comparisons"].append({"table": name, "model": Path(model.name).name, **result})
            print(report(result), end="\n\n", flush=True)
        del model, batch, vectors
        gc.collect()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out} after {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
