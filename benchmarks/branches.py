"""How fast are branches? Trials per second and peak memory of three ways to decode the same edited cells.

(a) published   one prompt, one cell at a time: copy its cache, edit the slot, decode token by token
(b) clones      engine "clones": the same, many rows packed into a batch
(c) shared      engine "shared": one prefix per prompt, own slots per row, mirrored cells computed once

for checkpoints/tiny (a random model of its shape until there is one) and a random model of exactly Llama-3.2-1B's
shape, in one process on the same cells, with the answers compared; the matrix FLOP/s of (c) as a fraction of what a
plain large matmul reaches; and how the time per trial grows with prompts, variants, prefix length and layers. Prints
tables and writes benchmarks/results/branches.json. Knows nothing about accuracy::

    python -m benchmarks.branches                          # both models; a few minutes on two CPU cores
    python -m benchmarks.branches --models tiny --no-scaling
    python -m benchmarks.branches --threads 1 --device cuda --grid
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from codi import CodiModel, LatentRollout, Projection, Protocol, load_codi
from codi.branches import BranchAnswers, decode_branches
from codi.edits import Branches, EditTable
from codi.rope import rotate, unrotate
from lm.text import EncodedBatch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "branches.json"
TINY = ROOT / "checkpoints" / "tiny"
COEFFICIENTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
N_LATENTS = 6
RANDOM_TIMES = 6.0  # differences between latents of the random 1B shape are a sixth of the latents
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 512,
        "vocab_size": 1200,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128259,
        "head_dim": 64,
    },
}


# --- Models and cells -------------------------------------------------------------------------------------------------


class _Numbers:
    """Stands in for a tokenizer: a random model's answers are read as numbers of tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


def random_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> CodiModel:
    """A random tied Llama with a CODI projection; quick to make, because weights repeat a block of random numbers."""
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048, rms_norm_eps=1e-5)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        width = shape["hidden_size"]
        prj = Projection(width, width).to(dtype)
    rotary = type(base.model.rotary_emb)(config)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(dtype)
    for module in (base, prj):
        module.to_empty(device=device)
        for number, parameter in enumerate(module.parameters()):
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
                continue
            count = parameter.numel()
            repeated = block.roll(7919 * number).repeat(-(-count // block.numel()))[:count]
            parameter.data.copy_(repeated.view(parameter.shape) / parameter.shape[1] ** 0.5)
    base.model.rotary_emb = rotary.to(device)
    base.tie_weights()
    vocab = shape["vocab_size"]
    protocol = Protocol("random", vocab - 4, vocab - 3, vocab - 1, vocab - 2, (vocab - 3,), (vocab - 1,))
    return CodiModel(base, prj, _Numbers(vocab), protocol, name="random", n_latents=N_LATENTS)


def random_prompts(model: CodiModel, n: int, length: int) -> EncodedBatch:
    """Left-padded random prompts of up to `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.vocab_size - 8, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.bool)
    for row in range(n):
        mask[row, : row % (1 + length // 8)] = False
    return EncodedBatch(ids.to(model.device), mask.to(model.device))


def read_prompts(model: CodiModel, n: int) -> EncodedBatch:
    """Questions of the arithmetic task for the shipped model."""
    from experiments.tasks import load_task

    problems = load_task("arithmetic", limit=n, suffix=model.protocol.question_suffix, min_steps=3)
    return model.encode([problem.question for problem in problems])


@dataclass(frozen=True)
class Cells:
    """A model, a rollout and the rows that every way decodes."""

    model: CodiModel
    run: LatentRollout
    table: EditTable
    branches: Branches
    max_new_tokens: int


def make_cells(
    model: CodiModel,
    batch: EncodedBatch,
    max_new_tokens: int,
    latents: Sequence[int],
    n_directions: int | None = None,
    times: float = 1.0,
) -> Cells:
    """All ordered latent pairs A-B times six coefficients at the given latents of every prompt, as in published sweeps:
    180 rows per prompt and latent. Half of them are mirrors: B-A with -c is A-B with c.

    Directions are differences of mean keys and values, as in a sweep. With `n_directions`: that many times six rows
    without mirrors, the 15 unordered pairs and then the same ones, scaled. All are multiplied by `times`: latents of a
    random model hardly differ, and edits that change no answer would be a weak check of the engines.
    """
    run = model.rollout(batch, N_LATENTS, keep=("keys", "values", "cache"))
    assert run.keys is not None and run.values is not None
    content = unrotate(run.keys.float(), run.latent_positions[:, :, None, None], model)
    keys, values = content.mean(0), run.values.float().mean(0)
    pairs = list((itertools.permutations if n_directions is None else itertools.combinations)(range(N_LATENTS), 2))
    n_directions = n_directions or len(pairs)
    chosen = [pairs[i % len(pairs)] for i in range(n_directions)]
    scale = torch.tensor([times * (1 + 0.1 * (i // len(pairs))) for i in range(n_directions)], device=model.device)
    scale = scale[:, None, None, None]
    table = EditTable(
        "kv",
        torch.stack([keys[a] - keys[b] for a, b in chosen]) * scale,
        torch.stack([values[a] - values[b] for a, b in chosen]) * scale,
    )
    grid = torch.cartesian_prod(
        torch.arange(len(batch)), torch.tensor(latents), torch.arange(n_directions), torch.arange(len(COEFFICIENTS))
    )
    coefficient = torch.tensor(COEFFICIENTS)[grid[:, 3]]
    return Cells(
        model, run, table, Branches(grid[:, 0], grid[:, 1], grid[:, 2], coefficient, coefficient), max_new_tokens
    )


# --- (a) the published way --------------------------------------------------------------------------------------------


@torch.no_grad()
def published(cells: Cells, rows: torch.Tensor, check: list[list[int]] | None = None) -> list[Any]:
    """Early exit, cell by cell: copy the cache, add the direction to one slot in every layer, decode greedily.

    With answers to check, per row, instead of tokens: how far below the largest logit the tokens of that answer come,
    at most, in steps of the model's dtype; 0 if this way gives the same answer.
    """
    model, run = cells.model, cells.run
    answers: list[Any] = []
    single: tuple[tuple[int, int], LatentRollout] | None = None
    for number, row in enumerate(rows.tolist()):
        branch = cells.branches.select([row])
        prompt, k, chosen = int(branch.prompt), int(branch.latent), int(branch.direction)
        if single is None or single[0] != (prompt, k):  # cells share the rollout up to latent k
            single = ((prompt, k), run.truncate(k).select([prompt]))
        start = single[1]
        position = int(start.first_position) + k - 1
        cache = copy.deepcopy(start.past_key_values)
        assert cache is not None and cells.table.keys is not None and cells.table.values is not None
        delta = rotate(cells.table.keys[chosen], position, model)
        for layer in range(model.n_layers):
            entry: Any = cache.layers[layer]
            entry.keys[0, :, -1] += (float(branch.key_coefficient) * delta[layer]).to(entry.keys.dtype)
            step = float(branch.value_coefficient) * cells.table.values[chosen, layer]
            entry.values[0, :, -1] += step.to(entry.values.dtype)
        mask = start.attention_mask
        fed = torch.tensor([model.protocol.after_latents], device=model.device)
        tokens: list[int] = []
        behind = 0.0
        for place in range(cells.max_new_tokens):
            mask = torch.cat((mask, mask.new_ones(1, fed.shape[1])), dim=1)
            positions = position + 1 + torch.arange(fed.shape[1], device=model.device)[None]
            logits = model.base(
                input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[0, -1]
            logits[list(model.protocol.excluded_logits)] = -torch.inf
            token = int(logits.argmax())
            if check is not None:
                top, ended = logits[token].double(), place == len(check[number])
                token = model.protocol.eos_id if ended else check[number][place]
                unit = torch.finfo(logits.dtype).eps * 2.0 ** top.abs().log2().floor()
                behind = max(behind, float((top - logits[token].double()) / unit))
            if token == model.protocol.eos_id:
                break
            tokens.append(token)
            position += fed.shape[1]
            fed = torch.tensor([[token]], device=model.device)
        answers.append(tokens if check is None else behind)
    return answers


# --- Measuring --------------------------------------------------------------------------------------------------------


class Peak:
    """Most memory that was held beyond what was held at the start, in MiB: of the process, or of the GPU."""

    mib: float = 0.0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    if platform.system() == "Linux":  # give freed memory back first, or reusing it would not show
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    process = psutil.Process()
    before = most = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.mib = (max(most, process.memory_info().rss) - before) / 2**20


def clock(work: Callable[[], Any], device: torch.device, repeats: int = 1) -> tuple[float, Any]:
    """Least seconds of some repeats, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain large square matmul."""
    size = 8192 if device.type == "cuda" else 1536
    x, y = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    clock(lambda: x @ y, device, 2)
    return 2 * size**3 / clock(lambda: x @ y, device, 6)[0]


def matrix_flops(cells: Cells, tokens: list[list[int]]) -> float:
    """Matrix FLOPs that the answers need: the decoder for every token that must be fed, the vocabulary for every token
    that is chosen. Attention, and whatever an engine computes in vain, is left out."""
    model = cells.model
    decoder = sum(p.numel() for name, p in model.decoder.named_parameters() if p.dim() == 2 and "embed" not in name)
    vocabulary = model.vocab_size * model.d_model
    flops = 0
    for row in tokens:
        chosen = min(len(row) + 1, cells.max_new_tokens)
        flops += 2 * (decoder * (len(model.protocol.after_latents) + chosen - 1) + vocabulary * chosen)
    return float(flops)


def same(a: list[list[int]], b: list[list[int]]) -> float:
    """Fraction of answers that are the same."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def widest_tie(cells: Cells, rows: torch.Tensor, others: list[list[int]], shared: BranchAnswers) -> float:
    """Where others answer otherwise than (c): how far below the largest logit of (a) the tokens of (c) come.

    In steps of the model's dtype; 0 if all answers are the same. In bfloat16 a sum in another order moves a logit by a
    few steps, which decides near ties.
    """
    differ = [(int(row), shared.tokens[row]) for row, x in zip(rows, others, strict=True) if x != shared.tokens[row]]
    if not differ:
        return 0.0
    return max(published(cells, torch.tensor([row for row, _ in differ]), [tokens for _, tokens in differ]))


def decode(cells: Cells, rows: Branches, **options: Any) -> BranchAnswers:
    """Early exit, as `published`."""
    limit = cells.max_new_tokens
    return decode_branches(cells.model, cells.run, cells.table, rows, max_new_tokens=limit, **options)


def compare(cells: Cells, n_published: int, n_clones: int, rounds: int = 3) -> dict[str, Any]:
    """The three ways on the same cells; the slow ones on an even sample of them.

    The ways take turns, so that a machine that is slow for a while is slow for all; the least time of each counts.
    """
    model, branches = cells.model, cells.branches
    device, size = model.device, len(branches)
    generator = torch.Generator().manual_seed(2)
    sample = torch.randperm(size, generator=generator)
    some, few = sample[:n_clones].sort().values, sample[:n_published].sort().values

    ways: dict[str, Callable[[], Any]] = {
        "shared": lambda: decode(cells, branches),
        "clones": lambda: decode(cells, branches.select(some), engine="clones"),
        "published": lambda: published(cells, few),
    }
    decode(cells, branches.select(few))  # warm up
    published(cells, few[:1])
    seconds, memory, found = dict.fromkeys(ways, float("inf")), dict.fromkeys(ways, 0.0), {}
    for _ in range(rounds):
        for name, way in ways.items():
            with peak_memory(device) as peak_mib:
                once, found[name] = clock(way, device)
            seconds[name], memory[name] = min(seconds[name], once), max(memory[name], peak_mib.mib)
    shared, clones, single = found["shared"], found["clones"], found["published"]
    seconds_c = seconds["shared"]
    unedited = decode(cells, branches.without_edit())
    peak = matmul_peak(device, model.dtype)
    flops = matrix_flops(cells, shared.tokens) * shared.n_computed / size  # a mirror has the tokens of its twin
    rate_a, rate_b, rate_c = len(few) / seconds["published"], len(some) / seconds["clones"], size / seconds_c
    return {
        "model": model.name.removeprefix(f"{ROOT}/"),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": len(cells.run),
        "positions": int(cells.run.attention_mask.shape[1]),
        "trials": {"published": len(few), "clones": len(some), "shared": size},
        "computed_once": shared.n_computed / size,
        "trials_per_second": {"published": rate_a, "clones": rate_b, "shared": rate_c},
        "peak_memory_mib": memory,
        "batch_size": {"published": 1, "clones": clones.batch_size, "shared": shared.batch_size},
        "times_published": rate_c / rate_a,
        "times_clones": rate_c / rate_b,
        "times_published_per_computed": rate_c * shared.n_computed / size / rate_a,
        "times_clones_per_computed": rate_c * shared.n_computed / size / rate_b,
        "same_answers": {
            "clones": same(clones.tokens, [shared.tokens[i] for i in some]),
            "published": same(single, [shared.tokens[i] for i in few]),
        },
        "widest_tie": max(widest_tie(cells, some, clones.tokens, shared), widest_tie(cells, few, single, shared)),
        "changed_by_edits": 1 - same(unedited.tokens, shared.tokens),
        "matmul_peak_gflops": peak / 1e9,
        "matrix_gflops": flops / seconds_c / 1e9,
        "fraction_of_peak": flops / seconds_c / peak,
    }


def compiled(cells: Cells, repeats: int = 3) -> float:
    """Time of shared decoding divided by its time with torch.compile of every norm and MLP (1: no gain).

    Whole decoders cannot be compiled as one graph here: attention goes through a registered function with a cache of
    its own. The compiled parts stay compiled.
    """
    model = cells.model
    decoder: Any = model.decoder
    decode(cells, cells.branches)
    before = min(clock(lambda: decode(cells, cells.branches), model.device)[0] for _ in range(repeats))
    for layer in decoder.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.compile(dynamic=True)
    decoder.norm.compile(dynamic=True)
    decode(cells, cells.branches)  # compiles
    after = min(clock(lambda: decode(cells, cells.branches), model.device)[0] for _ in range(repeats))
    return before / after


def profiled(cells: Cells, shown: int = 6) -> list[tuple[str, float]]:
    """Operations of shared decoding that take most time, with their share of the time of all, 0..1."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cells.model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    decode(cells, cells.branches)
    with torch.profiler.profile(activities=activities) as profile:
        decode(cells, cells.branches)
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        own = event.self_device_time_total if len(activities) > 1 else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0.0) + own
    total = sum(spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1])[:shown]
    return [(name, own / total) for name, own in ranked]


def scaling(device: torch.device, dtype: torch.dtype, repeats: int = 2) -> list[dict[str, Any]]:
    """Microseconds per trial of (c) on random models of the tiny shape, one size changed at a time."""
    usual = {"prompts": 8, "variants": 90, "prefix": 50, "layers": 4}
    changes = {
        "prompts": (2, 8, 32),
        "variants": (90, 360, 1440),
        "prefix": (25, 50, 100, 200, 400),
        "layers": (2, 4, 8),
    }
    rows = []
    for name, values in changes.items():
        for value in values:
            now = {**usual, name: value}
            model = random_model({**SHAPES["tiny"], "num_hidden_layers": now["layers"]}, device, dtype)
            batch = random_prompts(model, now["prompts"], now["prefix"])
            cells = make_cells(model, batch, 2, (2, 5), now["variants"] // len(COEFFICIENTS))
            seconds, found = clock(partial(decode, cells, cells.branches), device, repeats)
            trials = len(found.tokens)
            rows.append({"varied": name, **now, "trials": trials, "us_per_trial": seconds / trials * 1e6})
    return rows


def published_grid(device: torch.device) -> dict[str, Any]:
    """Seconds for 1,000 prompts × 6 latents × 30 ordered pairs × 6 coefficients, early exit, rollouts included.

    Mirrored cells, (A,B,c) and (B,A,-c), are computed once. Random 1B shape, 80 tokens, bfloat16.
    """
    model = random_model(SHAPES["llama-1b"], device, torch.bfloat16)
    total, trials, computed = 0.0, 0, 0
    for _ in range(10):
        start = time.perf_counter()
        cells = make_cells(model, random_prompts(model, 100, 80), 2, range(1, N_LATENTS + 1))
        found = decode(cells, cells.branches)
        if device.type == "cuda":
            torch.cuda.synchronize()
        total += time.perf_counter() - start
        trials += len(cells.branches)
        computed += found.n_computed
    return {"seconds": total, "trials": trials, "computed": computed}


# --- The command ------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """A comparison as text."""
    lines = [
        f"{result['model']}  {result['dtype']} on {result['device']}, {result['prompts']} prompts, "
        f"{result['positions']} positions",
        f"  {'':12}{'trials/s':>12}{'peak MiB':>12}{'rows at once':>14}{'trials':>10}{'same answers':>14}",
    ]
    for way in ("published", "clones", "shared"):
        agreement = result["same_answers"].get(way)
        lines.append(
            f"  {way:12}{result['trials_per_second'][way]:12,.1f}{result['peak_memory_mib'][way]:12,.0f}"
            f"{result['batch_size'][way]:14,d}{result['trials'][way]:10,d}"
            f"{'' if agreement is None else f'{agreement:.1%}':>14}"
        )
    lines.append(
        f"  shared = {result['times_published']:.1f} × published = {result['times_clones']:.1f} × clones "
        f"({result['computed_once']:.0%} of the trials computed, the rest are their mirrors; per computed trial "
        f"{result['times_published_per_computed']:.1f} × and {result['times_clones_per_computed']:.1f} ×)\n"
        f"  {result['matrix_gflops']:,.0f} of {result['matmul_peak_gflops']:,.0f} GFLOP/s "
        f"({result['fraction_of_peak']:.0%} of a plain matmul); edits changed {result['changed_by_edits']:.0%}"
    )
    if result["widest_tie"] > 0:
        steps = f"{result['widest_tie']:.1f} steps of {result['dtype']}"
        lines.append(f"  where answers differ, those of shared are at most {steps} below the largest logit")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.branches", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="tiny,llama-1b", help="of tiny, llama-1b (default: both)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="dtypes of the tiny model")
    parser.add_argument("--prompts", type=int, default=16, help="prompts for the tiny model")
    parser.add_argument("--large-prompts", type=int, default=2, help="prompts for the 1B shape (180 trials each)")
    parser.add_argument("--published-trials", type=int, default=None, help="trials of (a); default 200 and 6")
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True, help="the scaling table")
    parser.add_argument("--compile", action="store_true", help="also the tiny model with compiled norms and MLPs")
    parser.add_argument("--profile", action="store_true", help="also the operations that take most of our time")
    parser.add_argument("--grid", action="store_true", help="also the whole published grid at the 1B shape (GPU)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    large = device.type == "cuda"
    results: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if large else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "comparisons": [],
    }
    for name in options.models.split(","):
        if name not in SHAPES:
            parser.error(f"unknown model {name!r}: choose from {', '.join(SHAPES)}")
        for dtype_name in options.dtypes.split(",") if name == "tiny" else ["bfloat16"]:
            dtype = getattr(torch, dtype_name)
            if name == "tiny" and (TINY / "codi.json").exists():
                model = load_codi(TINY, device=options.device, dtype=dtype)
                cells = make_cells(model, read_prompts(model, options.prompts), 8, range(1, N_LATENTS + 1))
            elif name == "tiny":
                model = random_model(SHAPES[name], device, dtype)
                model.name = "random, tiny shape"
                batch = random_prompts(model, options.prompts, 50)
                cells = make_cells(model, batch, 2, range(1, N_LATENTS + 1), times=RANDOM_TIMES)
            else:
                model = random_model(SHAPES[name], device, dtype)
                model.name = "random, Llama-3.2-1B shape"
                prompts = 32 if large else options.large_prompts
                batch = random_prompts(model, prompts, 80)
                cells = make_cells(model, batch, 2, range(1, 7) if large else (4,), times=RANDOM_TIMES)
            few = options.published_trials or (200 if name == "tiny" else 200 if large else 6)
            some = 1536 if name == "tiny" or large else 48
            result = compare(cells, few, min(some, len(cells.branches)))
            results["comparisons"].append(result)
            print(report(result), end="\n\n", flush=True)
            if options.profile:
                result["profile"] = dict(profiled(cells))
                shares = ", ".join(f"{operation} {share:.0%}" for operation, share in result["profile"].items())
                print(f"  time goes to {shares}\n", flush=True)
            if options.compile and name == "tiny":
                result["times_compiled"] = compiled(cells)
                print(f"  with norms and MLPs compiled: {result['times_compiled']:.2f} x as fast\n", flush=True)
            del model, cells
            gc.collect()
    if options.scaling:
        results["scaling"] = scaling(device, torch.float32)
        print("time per trial, random tiny shape, float32 (shared)")
        for row in results["scaling"]:
            sizes = f"{row['prompts']:4d} prompts {row['variants']:5d} variants {row['prefix']:4d} tokens"
            print(f"  {row['varied']:9}{sizes} {row['layers']:2d} layers {row['us_per_trial']:9.1f} µs")
        print()
    if options.grid:
        results["published_grid"] = published_grid(device)
        grid = results["published_grid"]
        print(f"published grid, 1B shape: {grid['seconds']:.1f} s for {grid['trials']:,d} trials")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
