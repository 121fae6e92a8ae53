"""circuits.patching and circuits.upper: the numbers of whole passes, of TransformerLens, and what must be 0 or 1."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LM_KINDS, make_base
from safetensors.torch import load_file
from torch import Tensor

from circuits.heads import Heads
from circuits.patching import Patched, Probe, measures, patch, patch_set
from circuits.upper import replaced_forward
from lm.errors import UserError
from lm.load import load_lm
from lm.model import LanguageModel
from lm.text import EncodedBatch, left_padded


def make_probes(n: int = 6, seed: int = 0) -> list[Probe]:
    """Texts of different lengths that differ from some place on in one or two tokens; two are beginnings of others."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        clean = [rng.randrange(250) for _ in range(rng.randint(9, 20))]
        if i % 3 == 2:  # the beginning of the text before
            clean = list(found[-1].clean[: rng.randint(5, len(found[-1].clean))])
        corrupted = list(clean)
        for place in rng.sample(range(len(clean) - 1), 2):
            corrupted[place] = (corrupted[place] + 1 + rng.randrange(200)) % 250
        found.append(Probe(tuple(clean), tuple(corrupted), rng.randrange(250), rng.randrange(250)))
    found[0] = Probe(found[0].clean, (251, *found[0].clean[1:]), 3, 4)  # nothing is shared
    return found


def batch_of(ids: tuple[int, ...]) -> EncodedBatch:
    return left_padded([ids], 0)


def whole_pass(
    heads: Heads, probe: Probe, direction: str, edit: Callable[[int, Tensor, Tensor], Tensor], mlp: bool = False
) -> Tensor:
    """Next-token logits of one text of its own, patched in a whole pass by hooks."""
    base, source = (probe.corrupted, probe.clean) if direction == "denoise" else (probe.clean, probe.corrupted)
    given = heads.run(batch_of(source), z=True, mlp=True)
    from_source = given.mlp if mlp else given.z
    assert from_source is not None

    def change(block: int, x: Tensor) -> Tensor:
        return edit(block, x.clone(), from_source[:, :, block - 1])

    options = {"change_mlp": change} if mlp else {"change": change}
    return heads.run(batch_of(base), **options).logits[0]


def slow(heads: Heads, probes: list[Probe], site: str, positions: str, direction: str) -> Patched:
    """What `patch` gives, from one whole pass per patched run."""
    only = slice(None) if positions == "all" else slice(-1, None)
    units = {"head": [[h] for h in range(heads.n_heads)], "group": [list(g) for g in heads.groups]}.get(
        site, [list(range(heads.n_heads))]
    )
    shape = (heads.n_blocks, len(units), len(probes))
    values = {name: torch.zeros(shape, dtype=torch.float64) for name in ("kl", "logit_difference", "probability")}
    for i, probe in enumerate(probes):
        clean = heads.run(batch_of(probe.clean)).logits
        for b in range(heads.n_blocks):
            for u, which in enumerate(units):

                def edit(block: int, x: Tensor, source: Tensor, b: int = b, which: list[int] = which) -> Tensor:
                    if block == b + 1:
                        if site == "mlp":
                            x[:, only] = source[:, only]
                        else:
                            x[:, only, which] = source[:, only][:, :, which]
                    return x

                logits = whole_pass(heads, probe, direction, edit, mlp=site == "mlp")
                found = measures(logits[None], clean, torch.tensor([probe.target]), torch.tensor([probe.other]))
                for name, value in found.items():
                    values[name][b, u, i] = value[0]
    return Patched(site, positions, direction, (1, 2, 3), values, {}, {})  # type: ignore[arg-type]


def same(found: Patched, expected: dict[Any, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found.values[name], value, atol=2e-4, rtol=1e-3)


# --- Golden cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_golden_cases(golden_root, kind):
    folder = golden_root / "circuit" / kind
    texts = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    model = load_lm(str(folder / "model"), form="plain", device="cpu")
    heads = Heads(model)
    pairs = zip(*(model.encode(texts[name]).input_ids.tolist() for name in ("clean", "corrupted")), strict=True)
    probes = [Probe(tuple(a), tuple(b), 0, 1) for a, b in pairs]
    found = patch(heads, probes, keep_logits=True)
    scale = float(tensors["logits.clean"].abs().max())
    assert found.logits is not None
    for block in range(3):
        for head in range(4):
            expected = tensors[f"logits.patched.{block}.{head}"]
            torch.testing.assert_close(found.logits[block, head], expected, atol=1e-4 * scale, rtol=0)
    for value, name in (
        (found.values["kl"], "kl.patched"),
        (found.corrupted["kl"], "kl.corrupted"),
        (patch(heads, probes, positions="last").values["kl"], "kl.patched_last_position"),
    ):
        torch.testing.assert_close(value, tensors[name].double(), atol=1e-5, rtol=0)
    # E is a difference of two KLs over a third one, each of them within a millionth here.
    allowed = 2e-6 / float(tensors["kl.corrupted"].mean())
    torch.testing.assert_close(found.effect(), tensors["effect"].double(), atol=allowed, rtol=0)
    assert float(found.effect().max() - found.effect().min()) > 10 * allowed, "the tolerance would let anything pass"


# --- Against whole passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LM_KINDS)
def test_numbers_of_whole_passes(language_model, kind):
    """Every family: heads at all positions; lengths, shared beginnings and batches mixed."""
    heads = Heads(language_model(kind))
    probes = make_probes()
    expected = slow(heads, probes, "head", "all", "denoise").values
    for limits in ({}, {"tokens_at_once": 1, "columns_at_once": 1}, {"tokens_at_once": 50, "columns_at_once": 45}):
        same(patch(heads, probes, **limits), expected)
    assert float(expected["kl"].std()) > 0.01


@pytest.mark.parametrize("site", ["head", "group", "attention", "mlp"])
@pytest.mark.parametrize(("positions", "direction"), [("all", "noise"), ("last", "denoise"), ("last", "noise")])
def test_sites_positions_directions(language_model, site, positions, direction):
    heads = Heads(language_model("mistral"))  # grouped queries and a window that is shorter than most texts
    probes = make_probes(4, seed=1)
    found = patch(heads, probes, site, positions, direction)
    same(found, slow(heads, probes, site, positions, direction).values)
    assert found.values["kl"].shape == (3, {"head": 4, "group": 2}.get(site, 1), 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_residual_streams_by_position(language_model, kind):
    """Every layer and position against a hook on the block; before the first exchanged token nothing changes."""
    from lm.cache import build_cache
    from lm.forward import feed

    model = language_model(kind)
    heads, probes = Heads(model), make_probes(4, seed=2)
    found = patch(heads, probes, "residual", tokens_at_once=40)
    assert found.blocks == tuple(range(model.n_layers + 1))
    for i, probe in enumerate(probes):
        clean = heads.run(batch_of(probe.clean), residual=True)
        stream = clean.residual
        assert stream is not None
        target, other = torch.tensor([probe.target]), torch.tensor([probe.other])
        for layer in range(1, model.n_layers + 1):
            for back in range(1, found.values["kl"].shape[1] + 1):
                value = float(found.values["kl"][layer, -back, i])
                if back > len(probe.clean) - probe.changed:
                    assert value == pytest.approx(float(found.corrupted["kl"][i]), rel=1e-5)
                    continue

                def edit(at: int, x: Tensor, layer: int = layer, k: int = back, stream: Tensor = stream) -> Tensor:
                    if at != layer:
                        return x
                    x = x.clone()
                    x[:, -k] = stream[:, -k, layer]
                    return x

                batch = batch_of(probe.corrupted)
                with torch.no_grad():
                    last = feed(model, model.embed(batch.input_ids), build_cache(), None, batch.positions, edit).last
                expected = measures(model.logits(last[:, -1]).detach(), clean.logits, target, other)["kl"][0]
                assert value == pytest.approx(float(expected), abs=2e-4, rel=1e-3)
    end = found.effect()
    assert end[-1, -1] == pytest.approx(1, abs=1e-5) and end[0, -1] == pytest.approx(0, abs=1e-5)


def test_grouped_queries_are_repeated_heads(language_model):
    """Each key/value head written out for its query heads: the same model, the same effects."""
    model = language_model("llama")
    base = copy.deepcopy(model.base)
    config = copy.deepcopy(base.config)
    config.num_key_value_heads = model.n_heads
    wide = make_base("llama").__class__(config)
    state = base.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            rows = state[name].unflatten(0, (model.n_kv_heads, model.d_head))
            state[name] = rows.repeat_interleave(model.n_heads // model.n_kv_heads, 0).flatten(0, 1)
    wide.load_state_dict(state)
    probes = make_probes()
    grouped, repeated = Heads(model), Heads(LanguageModel(wide.eval()))
    assert len(grouped.groups) == 2 and len(repeated.groups) == 4
    torch.testing.assert_close(patch(grouped, probes).effect(), patch(repeated, probes).effect(), atol=1e-4, rtol=1e-3)
    both = patch(grouped, probes, "group").values["kl"][1, 1]
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[1, [2, 3]] = True
    torch.testing.assert_close(both, patch_set(repeated, probes, chosen).values["kl"][0, 0], atol=1e-4, rtol=1e-3)


# --- What must be so --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_everything_recovers_one_and_nothing_zero(language_model, kind):
    heads, probes = Heads(language_model(kind)), make_probes()
    every = torch.ones(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    all_mlps = torch.ones(heads.n_blocks, dtype=torch.bool)
    for direction in ("denoise", "noise"):
        whole = patch_set(heads, probes, every, all_mlps, direction=direction, batch_size=4)
        for measure in ("kl", "logit_difference", "probability"):
            assert whole.effect(measure).item() == pytest.approx(1, abs=1e-5)
            nothing = patch_set(heads, probes, ~every, ~all_mlps, direction=direction)
            assert nothing.effect(measure).item() == pytest.approx(0, abs=1e-5)
    every[0, 0] = False
    assert abs(patch_set(heads, probes, every, all_mlps).effect().item() - 1) > 1e-4, "one head is missing"


def test_clean_into_clean_changes_nothing(language_model):
    heads = Heads(language_model("llama"))
    probes = [Probe(p.clean, p.clean, p.target, p.other) for p in make_probes()]
    for site in ("head", "attention", "mlp", "residual"):
        found = patch(heads, probes, site)
        assert float(found.values["kl"].abs().max()) < 1e-8
        assert found.effect("probability").isnan().all() or float(found.gains("probability")[0].abs().max()) < 1e-5


def test_effects_are_ratios_of_means():
    values = {"kl": torch.tensor([[[1.0, 2.0]]]), "probability": torch.tensor([[[0.3, 0.5]]])}
    clean = {"kl": torch.tensor([0.0, 0.0]), "probability": torch.tensor([0.9, 0.5])}
    corrupted = {"kl": torch.tensor([1.0, 5.0]), "probability": torch.tensor([0.1, 0.1])}
    found = Patched("head", "all", "denoise", (1,), values, clean, corrupted)  # type: ignore[arg-type]
    assert found.effect().item() == pytest.approx((0 + 3) / (1 + 5))  # not the mean of 0 and 3/5
    assert found.effect("probability").item() == pytest.approx((0.2 + 0.4) / (0.8 + 0.4))
    other = Patched("head", "all", "noise", (1,), values, clean, corrupted)  # type: ignore[arg-type]
    assert other.effect().item() == pytest.approx(3 / 6)
    with pytest.raises(UserError, match="measure must be one of kl, logit_difference, probability, got 'x'"):
        found.effect("x")  # type: ignore[arg-type]


def test_measures_by_hand():
    logits = torch.tensor([[0.0, 0.0]])
    clean = torch.log(torch.tensor([[0.75, 0.25]]))
    found = measures(logits, clean, torch.tensor([0]), torch.tensor([1]))
    assert found["kl"].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["probability"].item() == pytest.approx(0.5) and found["logit_difference"].item() == 0


def test_no_trace_and_progress(language_model):
    model = language_model("llama")
    heads, probes = Heads(model), make_probes()

    def state() -> tuple[Any, ...]:
        modules = list(model.base.modules())
        return (
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
            sum("forward" in m.__dict__ for m in modules),
            model.attention,
        )

    before, plain = state(), heads.run(batch_of(probes[0].clean)).logits
    done: list[int] = []
    patch(heads, probes, advance=done.append)
    assert sum(done) == 3 * 4 * len(probes)
    assert state() == before

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(heads, probes, advance=stop)

    def broken(*args: Any, **given: Any) -> Any:
        raise RuntimeError("broken")

    with replaced_forward(model.blocks[2], broken), pytest.raises(RuntimeError, match="broken"):
        patch(heads, probes)
    assert state() == before and torch.equal(heads.run(batch_of(probes[0].clean)).logits, plain)


def test_refusals(language_model):
    heads, probes = Heads(language_model("llama")), make_probes(2)
    with pytest.raises(UserError, match="equally many tokens, got 2 and 1"):
        Probe((1, 2), (1,), 0, 1)
    with pytest.raises(UserError, match="at least one probe"):
        patch(heads, [])
    with pytest.raises(UserError, match="site must be one of head, group, attention, mlp, residual, got 'heads'"):
        patch(heads, probes, "heads")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"blocks must be in 1\.\.3 for the site 'head', got 0"):
        patch(heads, probes, blocks=[0])
    with pytest.raises(UserError, match=r"a set of heads must be \(3, 4\), got \(4, 3\)"):
        patch_set(heads, probes, torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="positions are needed"):
        long = tuple(range(256)) * 3
        patch(heads, [Probe(long, (1, *long[1:]), 0, 1)])
