"""The CUDA path without a CUDA device: same answers, no mixed devices, and where the host waits (see pretend_cuda.py).

Real devices: test_cuda_is_the_cpu in test_rollout.py, which runs where there is one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

import pandas as pd
import pytest
import torch
from pretend_cuda import OnDevice, pretend_cuda

from codi import LatentRollout, load_codi
from codi.branches import decode_branches
from codi.edits import Branches, EditTable
from experiments.study.edits.trials import read_trials
from experiments.sweep.options import SweepOptions
from experiments.sweep.run import sweep

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="pretends on builds of PyTorch without CUDA")

QUESTIONS = ["3+4=?", "Tom has 12 pens and buys 30 more?", "9-2"]
N = 4


# Sums are in another order on the two devices (fused attention, products with a bias): float64 makes that small.
close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-9)


def load(tiny_checkpoint, kind="llama", device="cpu"):
    folder = tiny_checkpoint(kind)
    options = {"protocol": "answer-only", "lora_alpha": 2, "dtype": torch.float64}
    return load_codi(folder / "checkpoint", base=folder / "base", device=device, **options)


# --- The pretended device does what a real one does -------------------------------------------------------------------


def test_pretended_device():
    host = torch.arange(6.0).view(2, 3)
    with pretend_cuda() as device:
        x = host.to("cuda")
        assert x.device.type == "cuda" and isinstance(x, OnDevice)
        assert torch.zeros(2, device=x.device).device == x.device == torch.tensor([1, 2], device="cuda").device
        y = (x * 2 + 1)[:, 1:].transpose(0, 1).contiguous()
        y[0] += 1
        assert not device.waits, "nothing so far needs an answer"
        assert torch.equal(y.cpu(), (host * 2 + 1)[:, 1:].T + torch.tensor([[1.0], [0.0]]))
        assert device.waits.pop("_to_copy") == 1
        for wait in (lambda: x.sum().item(), lambda: bool((x > 1).any()), lambda: x.nonzero(), lambda: x[x > 1]):
            before = device.waits.total()
            wait()
            assert device.waits.total() == before + 1
        assert torch.equal(x[torch.tensor([1])].cpu(), host[[1]]), "indices may come from the host"
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.cat((x, host)),
            lambda: x @ host.T,
            lambda: host[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: torch.where(x > 1, x, host),
            lambda: x.add_(host),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
    assert not torch.cuda.is_available()


# --- The same numbers as on the CPU -----------------------------------------------------------------------------------


def test_cuda_is_chosen_where_it_is(tiny_checkpoint):
    with pretend_cuda():
        assert load(tiny_checkpoint, device=None).device.type == "cuda"
    assert load(tiny_checkpoint, device=None).device.type == "cpu"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral"])
def test_rollouts_and_answers(tiny_checkpoint, kind):
    here = load(tiny_checkpoint, kind)
    run = here.rollout(here.encode(QUESTIONS), N)
    with pretend_cuda():
        there = load(tiny_checkpoint, kind, "cuda")
        other = there.rollout(there.encode(QUESTIONS), N)
        assert other.states.device.type == "cuda"
        other = other.to("cpu")
        answers = [there.answer(QUESTIONS, max_new_tokens=3, mode=mode) for mode in ("latent", "direct", "verbal")]
        sampled = there.answer(QUESTIONS, max_new_tokens=3, temperature=0.5, seed=1)
    for name in ("states", "hidden_states", "keys", "values"):
        close(getattr(other, name), getattr(run, name))
    assert answers == [here.answer(QUESTIONS, max_new_tokens=3, mode=mode) for mode in ("latent", "direct", "verbal")]
    assert sampled == here.answer(QUESTIONS, max_new_tokens=3, temperature=0.5, seed=1)


def edits(model, space, seed=0):
    """A table of random directions and one row per prompt, latent, direction and coefficient."""
    generator = torch.Generator().manual_seed(seed)
    if space == "kv":
        shape = (2, model.n_layers, model.n_kv_heads, model.d_head)
        table = EditTable("kv", *(torch.randn(shape, generator=generator) for _ in range(2)))
    else:
        table = EditTable(space, vectors=torch.randn(2, model.d_model, generator=generator))
    grid = torch.cartesian_prod(
        torch.arange(len(QUESTIONS)), torch.tensor([2, 3]), torch.arange(-1, 2), torch.arange(2)
    )
    coefficient = torch.tensor([1.0, -0.5])[grid[:, 3]]
    return table, Branches(grid[:, 0], grid[:, 1], grid[:, 2], coefficient, coefficient)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("timing", ["early-exit", "continue", "cached"])
@pytest.mark.parametrize("space", ["kv", "embedding", "hidden"])
def test_branches(tiny_checkpoint, space, timing, drafts):
    def decode(model):
        run: LatentRollout = model.rollout(model.encode(QUESTIONS), N)
        table, branches = edits(model, space)
        options = {"timing": timing, "drafts": drafts, "max_new_tokens": 3, "keep_first_logits": True}
        return decode_branches(model, run, table, branches, batch_size=20, **options)

    here = decode(load(tiny_checkpoint))
    with pretend_cuda():
        there = decode(load(tiny_checkpoint, device="cuda"))
    assert there.tokens == here.tokens
    close(there.first_logits, here.first_logits)
    close(there.applied_norm, here.applied_norm)


def test_a_sweep(tiny_checkpoint, tmp_path):
    options = SweepOptions(
        out=tmp_path / "cpu",
        space=("kv", "embedding"),
        limit=4,
        min_steps=1,
        max_steps=1,
        derivation=8,
        draws=2,
        pairs=("1-2",),
        latents=("1", "3"),
        max_new_tokens=2,
        plots=False,
        device="cpu",
    )
    here = read_trials(sweep(options, load(tiny_checkpoint)))
    with pretend_cuda():
        there = read_trials(
            sweep(
                dataclasses.replace(options, out=tmp_path / "cuda", device="cuda"),
                load(tiny_checkpoint, device="cuda"),
            )
        )
    pd.testing.assert_frame_equal(there, here, rtol=1e-9)


# --- Where the host waits ---------------------------------------------------------------------------------------------


def waits_of(tiny_checkpoint, max_new_tokens: int, timing: str, size: int = 1) -> Counter[str]:
    """What one call waits for; no answer ends before the limit."""
    with pretend_cuda() as device:
        model = load(tiny_checkpoint, device="cuda")
        model.protocol = dataclasses.replace(model.protocol, excluded_logits=(model.protocol.eos_id,))
        run = model.rollout(model.encode(QUESTIONS), N)
        table, branches = edits(model, "kv")
        one = branches.select(((branches.latent == 2) & (branches.direction >= 0)).nonzero()[:, 0])
        again = torch.arange(size).repeat_interleave(len(one))  # no two rows alike, or they would be computed once
        coefficient = one.value_coefficient.repeat(size) * (1 + 0.1 * again)
        one = one.select(torch.arange(len(one)).repeat(size))
        one = dataclasses.replace(one, key_coefficient=coefficient, value_coefficient=coefficient)
        device.waits.clear()
        found = decode_branches(
            model,
            run,
            table,
            one,
            timing=timing,
            max_new_tokens=max_new_tokens,
            drafts=False,  # type: ignore[arg-type]
        )
        assert found.n_computed == len(one)
        assert not any(found.finished) and {len(row) for row in found.tokens} == {max_new_tokens}
        return device.waits.copy()


@pytest.mark.parametrize("timing", ["early-exit", "continue", "cached"])
def test_one_wait_per_token(tiny_checkpoint, timing):
    short, long = (waits_of(tiny_checkpoint, limit, timing) for limit in (3, 10))
    assert long - short == Counter({"index": 7}), "which rows go on is all that the host asks for after each token"


def test_results_come_back_once(tiny_checkpoint):
    few, many = (waits_of(tiny_checkpoint, 3, "cached", size) for size in (1, 5))
    assert many == few, "the number of rows does not matter"
