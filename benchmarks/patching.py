"""How fast is patching? Patched runs per second of two ways to patch the same heads of the same items.

(a) whole texts   one head, one item at a time: a hook on the output projection, the whole text through the whole model
                  (how patching by hooks is usually done, TransformerLens's loop among them)
(b) circuits      `circuits.patching.patch`: tokens before the first exchanged word are a shared prefix, blocks below
                  the patched one are passed over, all heads of a block in one batch

on two-hop ontologies with six demonstrations, every cut point of the gold chain, the last earlier mention exchanged,
for checkpoints/smollm2 (a random model of its shape where there is none), numbers compared. (b) includes its passes
over clean and corrupted texts; (a) does not. Prints a table and writes benchmarks/results/patching.json::

    python -m benchmarks.patching                          # some minutes on two CPU cores
    python -m benchmarks.patching --items 4 --whole 40
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from circuits.heads import Heads
from circuits.patching import Probe, measures, patch
from experiments.tasks.alignment import encode
from experiments.tasks.ontology_corruption import corrupt
from experiments.tasks.ontology_text import generate
from experiments.tasks.ontology_words import TRAINING, fit
from lm.load import load_lm
from lm.model import LanguageModel
from lm.text import left_padded

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "patching.json"
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
TINY = ROOT / "checkpoints" / "tiny" / "base"


def make_model(device: str) -> LanguageModel:
    """SmolLM2-135M, or a random model of its shape with the vocabulary of the tiny checkpoint."""
    if (SMOLLM2 / "config.json").exists():
        return load_lm(str(SMOLLM2), form="plain", device=device)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, initializer_range=0.05,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)
    return LanguageModel(base.to(device), tokenizer, name="random, SmolLM2-135M's shape")


def make_probes(model: LanguageModel, items: int) -> list[Probe]:
    """Every cut point of some items whose corruption is aligned."""
    lexicon = fit(TRAINING, model.tokenizer)
    probes = []
    for item in generate(items, lexicon, hops=2, seed="benchmark"):
        clean = encode(model.tokenizer, item.text)
        for cut in item.cuts:
            try:
                corrupted = corrupt(item, cut.number, "last", lexicon, tokenizer=model.tokenizer)
            except ValueError:
                continue
            other = encode(model.tokenizer, corrupted.text)
            place, target = clean.predicted(cut.span)
            new = encode(model.tokenizer, " " + corrupted.new.text).ids[0]
            probes.append(Probe(clean.ids[: place + 1], other.ids[: place + 1], target, new))
    return probes


def whole_texts(heads: Heads, runs: Sequence[tuple[Probe, int, int]]) -> tuple[float, list[float]]:
    """(a): seconds of the patched passes alone, and KL(clean ‖ patched) of each."""
    seconds, values = 0.0, []
    for probe, block, head in runs:
        clean_batch, batch = (left_padded([ids], 0).to(heads.model.device) for ids in (probe.clean, probe.corrupted))
        clean = heads.run(clean_batch, z=True)
        assert clean.z is not None
        source = clean.z[:, :, block - 1, head]

        def change(at: int, z: Tensor, block: int = block, head: int = head, source: Tensor = source) -> Tensor:
            if at != block:
                return z
            z = z.clone()
            z[:, :, head] = source
            return z

        start = time.perf_counter()
        logits = heads.run(batch, change).logits
        seconds += time.perf_counter() - start
        found = measures(logits, clean.logits, torch.tensor([probe.target]), torch.tensor([probe.other]))
        values.append(float(found["kl"][0]))
    return seconds, values


def compare(model: LanguageModel, items: int, whole: int, step: int, tokens_at_once: int) -> dict[str, Any]:
    """Both ways; (a) on an even sample of the patched runs of (b), which takes every `step`-th block."""
    heads, probes = Heads(model), make_probes(model, items)
    # As many blocks above as below on average, as in a run over all of them.
    blocks = list(range(1 + (heads.n_blocks - 1) % step // 2, heads.n_blocks + 1, step))
    patch(heads, probes[:1], blocks=blocks[-1:])  # warm up
    start = time.perf_counter()
    found = patch(heads, probes, blocks=blocks, tokens_at_once=tokens_at_once)
    seconds = time.perf_counter() - start
    count = found.values["kl"].numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:whole].tolist()
    runs, ours = [], []
    for i in order:
        block, rest = divmod(i, heads.n_heads * len(probes))
        head, probe = divmod(rest, len(probes))
        runs.append((probes[probe], blocks[block], head))
        ours.append(float(found.values["kl"][block, head, probe]))
    whole_seconds, theirs = whole_texts(heads, runs)
    needed = [len(probe.clean) - probe.changed for probe in probes]
    last = time.perf_counter()
    patch(heads, probes, positions="last", blocks=blocks, tokens_at_once=tokens_at_once)
    last = time.perf_counter() - last
    return {
        "model": model.name,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "probes": len(probes),
        "blocks": blocks,
        "tokens": sum(len(probe.clean) for probe in probes) / len(probes),
        "tokens_run": sum(needed) / len(needed),
        "runs": {"whole": len(runs), "circuits": count},
        "runs_per_second": {"whole": len(runs) / whole_seconds, "circuits": count / seconds, "last": count / last},
        "times": count / seconds / (len(runs) / whole_seconds),
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "largest_kl": max(theirs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patching", description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=2, help="ontologies, 11 cut points each")
    parser.add_argument("--whole", type=int, default=20, help="patched runs of the slow way")
    parser.add_argument("--step", type=int, default=6, help="every how many blocks are patched")
    parser.add_argument("--tokens-at-once", type=int, default=2048, help="of patched rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model = make_model(options.device)
    result = compare(model, options.items, options.whole, options.step, options.tokens_at_once)
    rate = result["runs_per_second"]
    print(
        f"{result['model']} on {result['device']}, {result['threads']} threads, {result['probes']} probes of "
        f"{result['tokens']:.0f} tokens, of which {result['tokens_run']:.1f} follow the first exchanged one"
    )
    print(f"  {'':24}{'runs/s':>10}{'runs':>10}")
    print(f"  {'(a) whole texts':24}{rate['whole']:10.2f}{result['runs']['whole']:10d}")
    print(f"  {'(b) all positions':24}{rate['circuits']:10.2f}{result['runs']['circuits']:10d}")
    print(f"  {'(b) last position':24}{rate['last']:10.2f}{result['runs']['circuits']:10d}")
    print(
        f"  (b) = {result['times']:.1f} × (a); KL differs by at most {result['largest_difference']:.1g} nats (the "
        f"largest is {result['largest_kl']:.2g})"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
