"""How fast is lens training? Prompts per second of rollout + training against a batch-1 loop, and peak memory.

(a) published   as the published trainer has it: one lens after another, one prompt at a time: prompt and latents with
                the plain Hugging Face model, every layer of the lens, backward, one optimiser step per prompt
(b) here        `lenses.LensTraining`: a batch is rolled out once and trains every lens × layer

for one lens pooled over all latents (like for like), and for a set of eight: one per position (begin of thought,
latents 1..6) and the pooled one, for which (a) goes through the prompts eight times. The peak memory of (b) is read in
processes of their own, for two numbers of prompts. Uses checkpoints/tiny, or an untrained model of its shape until
there is one. Prints a table and writes benchmarks/results/lens.json::

    python -m benchmarks.lens
    python -m benchmarks.lens --model bcywinski/codi_llama1b-answer_only --batch-size 16 --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tuned_lens.nn import TunedLens

from codi import CodiModel, load_codi
from experiments.tasks import load_task, with_suffix
from lenses import LatentLens, LensTraining, TrainingOptions, divergence_to_output, new_lens, unembed
from lenses.training import collect_states

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lens.json"
TINY = ROOT / "checkpoints" / "tiny"
LR = 1e-3


def load(name: str | None, device: str | None) -> CodiModel:
    """The model to measure."""
    if name or TINY.is_dir():
        return load_codi(name or TINY, device=device)
    from experiments.train.model import build_model
    from experiments.train.options import Resolved

    torch.manual_seed(0)
    return build_model(Resolved(), "sdpa")[0]


def questions_of(model: CodiModel, n: int) -> list[str]:
    """Training questions of the arithmetic task."""
    problems = with_suffix(load_task("arithmetic", "train", n), model.protocol.question_suffix)
    return [problem.question for problem in problems]


def lens_set(model: CodiModel, which: str) -> dict[str, tuple[int, ...]]:
    """Name -> positions of the lenses to train."""
    pooled = {"all": tuple(range(1, model.n_latents + 1))}
    return pooled if which == "pooled" else {str(k): (k,) for k in range(model.n_latents + 1)} | pooled


def published(model: CodiModel, questions: Sequence[str], positions: Sequence[int]) -> TunedLens:
    """Train one lens as the published loop does, except that the target is normed once, as it should be."""
    shared = unembed(model)
    lens = new_lens(model, shared)
    optimizer = torch.optim.Adam([p for t in lens for p in t.parameters()], lr=LR)
    for question in questions:
        ids = model.encode([question]).input_ids
        states = []
        with torch.no_grad():
            output = model.base(input_ids=ids, use_cache=True, output_hidden_states=True)
            states.append(torch.stack([h[0, -1] for h in output.hidden_states]))
            for _ in range(max(positions)):
                z = model.project(output.hidden_states[-1][:, -1:])
                output = model.base(
                    inputs_embeds=z, past_key_values=output.past_key_values, use_cache=True, output_hidden_states=True
                )
                states.append(torch.stack([h[0, -1] for h in output.hidden_states]))
        optimizer.zero_grad()
        loss = torch.zeros((), device=model.device)
        for position in positions:
            hidden = states[position].float()
            target = shared.unembedding(hidden[-1]).log_softmax(-1)
            for layer in range(model.n_layers):
                guess = lens(hidden[layer], layer).log_softmax(-1)
                loss = loss + (target.exp() * (target - guess)).sum()
        loss.backward()
        optimizer.step()
    return lens


def here(model: CodiModel, questions: Sequence[str], which: str, batch_size: int) -> LensTraining:
    """Train a set of lenses in one pass."""
    chunks = [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]
    training = LensTraining(model, lens_set(model, which), TrainingOptions(steps=len(chunks), lr=LR))
    for chunk in chunks:
        training.update(chunk)
    return training


def clock(work: Any, device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak(arguments: argparse.Namespace, prompts: int) -> float:
    """Peak memory in MB (resident set; on CUDA: of the device) of a process that trains on so many prompts."""
    command = [sys.executable, "-m", "benchmarks.lens", "--memory-of", str(prompts)]
    command += ["--batch-size", str(arguments.batch_size), "--threads", str(arguments.threads)]
    for name in ("model", "device"):
        if getattr(arguments, name):
            command += [f"--{name}", getattr(arguments, name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="checkpoint; default: checkpoints/tiny")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: what there is")
    parser.add_argument("--prompts", type=int, default=512, help="prompts of (b)")
    parser.add_argument("--slow-prompts", type=int, default=24, help="prompts of (a), from which its rate is taken")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once in (b)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="the fastest of so many runs counts, (a) and (b) in turn"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = load(given.model, given.device)
    if given.memory_of:
        here(model, questions_of(model, given.memory_of), "each", given.batch_size)
        on_device = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
        print(on_device / 2**20 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return 0

    questions = questions_of(model, max(given.prompts, given.slow_prompts))
    few, many = questions[: given.slow_prompts], questions[: given.prompts]
    result: dict[str, Any] = {
        "model": Path(model.name).name,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "prompts": len(many),
        "slow_prompts": len(few),
        "batch_size": given.batch_size,
        "rates": {},
    }
    for which in ("pooled", "each"):
        lenses = lens_set(model, which)
        slow, fast = [], []
        here(model, many[: 2 * given.batch_size], which, given.batch_size)  # warm up
        for _ in range(given.repeats):
            slow.append(sum(clock(lambda p=p: published(model, few, p), model.device) for p in lenses.values()))
            fast.append(clock(lambda which=which: here(model, many, which, given.batch_size), model.device))
        a, b = len(few) / min(slow), len(many) / min(fast)
        result["rates"][which] = {"lenses": len(lenses), "published": a, "here": b, "ratio": b / a}
    # the same quality: KL on held-out prompts of the pooled lens after the same prompts, one pass each
    problems = with_suffix(load_task("arithmetic", "test", 128), model.protocol.question_suffix)
    states = collect_states(model, [p.question for p in problems], range(1, model.n_latents + 1))
    shared = unembed(model)
    trained = {
        "plain": LatentLens(shared, model.n_layers),
        "published": LatentLens(shared, model.n_layers, published(model, many, range(1, model.n_latents + 1))),
        "here": here(model, many, "pooled", 8).lens("all"),
    }
    result["held_out_nats"] = {
        name: float(divergence_to_output(lens, states)[:, :-1].mean()) for name, lens in trained.items()
    }
    result["peak_mb"] = {str(n): peak(given, n) for n in (given.prompts // 4, given.prompts)}

    print(
        f"{result['model']}, {model.device}, {result['threads']} threads, {model.n_layers} layers × "
        f"{model.n_latents} latents"
    )
    print(f"{'':28}{'(a) published':>16}{'(b) here':>12}{'ratio':>8}   prompts per second, rollout + training")
    for which, words in (("pooled", "one pooled lens"), ("each", "one per position + pooled")):
        row = result["rates"][which]
        print(
            f"{words + ' (' + str(row['lenses']) + ')':28}{row['published']:16.2f}{row['here']:12.1f}"
            f"{row['ratio']:8.1f}"
        )
    kl = result["held_out_nats"]
    print(
        f"held-out KL of the pooled lens after one pass over {len(many)} prompts, mean over latents and layers, "
        "nats: "
        f"plain {kl['plain']:.3f}, (a) {kl['published']:.3f}, (b, batches of 8) {kl['here']:.3f}"
    )
    print(
        "peak memory of (b), 8 lenses: "
        + ", ".join(f"{mb:.0f} MB for {n} prompts" for n, mb in result["peak_mb"].items())
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
