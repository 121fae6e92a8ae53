"""Branches = clones edited one by one = everything recomputed in float64 without a cache, every space and timing."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lm.generate
from codi import CodiModel, LatentRollout, UserError, engines
from codi import branches as engine
from codi.branches import BranchAnswers, decode_branches
from codi.edits import Branches, EditTable
from lm.cache import BranchCache

N_LATENTS = 4
MAX_NEW = 4
N_DIRECTIONS = 5
SPACES = ("kv", "embedding", "hidden")
TIMINGS = ("early-exit", "continue", "cached")
QUESTIONS = ["3+4=?", "9-2", "Tom has 12 pens and buys 30 more?", "1+1", "5"]
KINDS = ("llama", "gpt2", "qwen2", "qwen3", "mistral")


# --- Models, rollouts, random edits -----------------------------------------------------------------------------------


def with_frequent_eos(model: CodiModel) -> CodiModel:
    """The model with a frequent answer token as its end of text, so that some answers end early and others do not."""
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", seed=5, size=60)
    answers = decode_branches(model, run, table, branches, engine="clones", max_new_tokens=MAX_NEW)
    counts = Counter(token for row in answers.tokens for token in row[1:])
    other = copy.copy(model)
    other.protocol = dataclasses.replace(model.protocol, eos_id=counts.most_common(1)[0][0])
    return other


@pytest.fixture(scope="module")
def doubles(tiny_model: Callable[..., CodiModel]) -> Callable[..., CodiModel]:
    """doubles(kind, family, **options): a tiny model in float64, whose answers end early now and then."""
    made: dict[Any, CodiModel] = {}

    def make(kind: str = "llama", family: str = "answer-only", **options: Any) -> CodiModel:
        key = (kind, family, *sorted(options.items()))
        if key not in made:
            model = copy.copy(tiny_model(kind, family, **options))
            model.base, model.prj = copy.deepcopy(model.base).double(), copy.deepcopy(model.prj).double()
            model.decoder = model.base.base_model
            blocks = getattr(model.decoder, "layers", None)
            model.blocks = model.decoder.h if blocks is None else blocks
            made[key] = with_frequent_eos(model)
        return made[key]

    return make


def random_edits(
    model: CodiModel,
    space: str,
    part: str = "both",
    frame: str = "content",
    seed: int = 0,
    size: int = 24,
    n_edits: int = 1,
    scale: float = 1.0,
) -> tuple[EditTable, Branches]:
    """Random directions (the second one in one layer and kv-head only) and rows; some rows have no edit."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    if space == "kv":
        shape = (N_DIRECTIONS, model.n_layers, model.n_kv_heads, model.d_head)
        keys, values = normal(*shape), normal(*shape)
        for tensor in (keys, values):
            kept = tensor[1, 1, 0].clone()
            tensor[1] = 0
            tensor[1, 1, 0] = kept
        table = EditTable(
            "kv",
            keys if part in ("keys", "both") else None,
            values if part in ("values", "both") else None,
            keys_frame=frame,  # type: ignore[arg-type]
        )
    else:
        table = EditTable(space, vectors=normal(N_DIRECTIONS, model.d_model))  # type: ignore[arg-type]
    prompt = torch.randint(0, len(QUESTIONS), (size,), generator=generator)
    latent = torch.stack([torch.randperm(N_LATENTS, generator=generator)[:n_edits] + 1 for _ in range(size)])
    direction = torch.randint(-1, N_DIRECTIONS, latent.shape, generator=generator)
    coefficient = torch.randn(2, *latent.shape, generator=generator)
    coefficient[:, torch.rand(size, generator=generator) < 0.15] = 0
    replace = torch.rand(latent.shape, generator=generator) < (0.3 if space != "kv" else 0.0)
    if n_edits == 1:
        latent, direction, replace = latent[:, 0], direction[:, 0], replace[:, 0]
        coefficient = coefficient[..., 0]
    return table, Branches(prompt, latent, direction, coefficient[0], coefficient[1], replace)


def same_answers(first: BranchAnswers, second: BranchAnswers, tolerance: float = 1e-9) -> None:
    assert first.tokens == second.tokens
    assert first.texts == second.texts
    assert first.finished == second.finished
    assert torch.equal(first.first_token, second.first_token)
    torch.testing.assert_close(first.applied_norm, second.applied_norm, rtol=tolerance, atol=tolerance)
    if first.first_logits is not None and second.first_logits is not None:
        torch.testing.assert_close(first.first_logits, second.first_logits, rtol=tolerance, atol=tolerance)


# --- The oracle: one forward pass over the whole text, no cache, no padding, attention written out --------------------


class Oracle:
    """Answers of one branch by recomputing the whole text for every token.

    The key and value that later tokens read at an edited place are the ones computed there plus the edit; tokens before
    `since` read what was computed.
    """

    def __init__(self, model: CodiModel) -> None:
        self.model = model
        self.edits: list[tuple[int, int, Tensor | None, Tensor | None]] = []  # (place, since, keys, values) per layer
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        layer, length = module.layer_idx, query.shape[2]
        self.seen[layer] = (key[0], value[0])
        group = query.shape[1] // key.shape[1]
        output = torch.zeros_like(query)
        for t in range(length):
            keys, values = key[0, :, : t + 1].clone(), value[0, :, : t + 1].clone()
            for place, since, dk, dv in self.edits:
                if t >= since:
                    keys[:, place] += 0 if dk is None else dk[layer]
                    values[:, place] += 0 if dv is None else dv[layer]
            start = 0 if options.get("sliding_window") is None else max(0, t + 1 - options["sliding_window"])
            for head in range(query.shape[1]):
                scores = keys[head // group, start:] @ query[0, head, t] * options["scaling"]
                output[0, head, t] = scores.softmax(0) @ values[head // group, start:]
        return output.transpose(1, 2), None

    @contextmanager
    def installed(self) -> Iterator[None]:
        AttentionInterface.register("oracle", self.attend)
        AttentionMaskInterface.register("oracle", lambda *_, **__: None)
        config = self.model.decoder.config
        configured, config._attn_implementation = config._attn_implementation, "oracle"
        yield
        config._attn_implementation = configured

    def states(self, embeddings: Sequence[Tensor]) -> Tensor:
        x = torch.stack(list(embeddings))[None]
        positions = torch.arange(x.shape[1])[None]
        out = self.model.decoder(inputs_embeds=x, position_ids=positions, attention_mask=None, use_cache=False)
        return out.last_hidden_state[0]

    def rotated(self, keys: Tensor, place: int) -> Tensor:
        rotary = getattr(self.model.decoder, "rotary_emb", None)
        if rotary is None:
            return keys
        cos, sin = rotary(keys, torch.tensor([[place]]))
        return apply_rotary_pos_emb(keys[None], keys[None], cos, sin)[0][0]

    def answer(self, ids: list[int], table: EditTable, row: Branches, timing: str) -> tuple[list[int], Tensor]:
        """Tokens, and the first logits, of a single row."""
        model, n = self.model, N_LATENTS
        k, c_keys, c = int(row.latent), float(row.key_coefficient), float(row.value_coefficient)
        chosen = int(row.direction)
        assert row.replace is not None
        exit_ = k if timing == "early-exit" else n
        self.edits = []
        text = [model.embed(torch.tensor(i)) for i in ids]
        width = len(text)
        place = width + k - 1

        def slot_edit(since: int) -> None:
            assert table.space == "kv"
            dk = None if table.keys is None else c_keys * table.keys[chosen]
            if dk is not None and table.keys_frame == "content":
                dk = self.rotated(dk, place)
            dv = None if table.values is None else c * table.values[chosen]
            self.edits.append((place, since, dk, dv))

        def changed(x: Tensor) -> Tensor:
            assert table.vectors is not None
            vector = c * table.vectors[chosen]
            return vector if bool(row.replace) else x + vector

        def latents(until: int, edited: bool) -> None:
            for j in range(len(text) - width + 1, until + 1):
                h = self.states(text)[-1]
                if edited and j == k and table.space == "hidden":
                    h = changed(h)
                z = model.project(h)
                if edited and j == k and table.space == "embedding":
                    z = changed(z)
                text.append(z)
                if edited and j == k and table.space == "kv" and timing == "continue":
                    slot_edit(place + 1)

        if chosen < 0:
            latents(exit_, edited=False)
        elif table.space == "kv":
            latents(exit_, edited=timing == "continue")
            if timing != "continue":
                slot_edit(width + exit_)
        elif timing == "cached":
            latents(k, edited=True)
            self.states(text)
            edited = {layer: (keys[:, place], values[:, place]) for layer, (keys, values) in self.seen.items()}
            del text[width:]
            latents(n, edited=False)
            self.states(text)
            plain = {layer: (keys[:, place], values[:, place]) for layer, (keys, values) in self.seen.items()}
            layers = range(model.n_layers)
            dk = torch.stack([edited[layer][0] - plain[layer][0] for layer in layers])
            dv = torch.stack([edited[layer][1] - plain[layer][1] for layer in layers])
            self.edits.append((place, width + n, dk, dv))
        else:
            latents(exit_, edited=True)

        text += [model.embed(torch.tensor(i)) for i in model.protocol.after_latents]
        tokens: list[int] = []
        first = None
        for _ in range(MAX_NEW):
            logits = model.logits(self.states(text)[-1])
            first = logits if first is None else first
            allowed = logits.clone()
            allowed[list(model.protocol.excluded_logits)] = -torch.inf
            token = int(allowed.argmax())
            if token == model.protocol.eos_id:
                break
            tokens.append(token)
            text.append(model.embed(torch.tensor(token)))
        assert first is not None
        return tokens, first


def check_against_oracle(model: CodiModel, table: EditTable, branches: Branches, timing: Any) -> None:
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    batch = model.encode(QUESTIONS)
    ids = [i[m].tolist() for i, m in zip(batch.input_ids, batch.attention_mask, strict=True)]
    found = decode_branches(
        model, run, table, branches, timing=timing, max_new_tokens=MAX_NEW, keep_first_logits=True, drafts=True
    )
    clones = decode_branches(
        model, run, table, branches, timing=timing, max_new_tokens=MAX_NEW, keep_first_logits=True, engine="clones"
    )
    same_answers(found, clones)
    assert found.first_logits is not None
    oracle = Oracle(model)
    with oracle.installed(), torch.no_grad():
        for row in range(len(branches)):
            one = branches.select([row])
            tokens, logits = oracle.answer(ids[int(one.prompt)], table, one, timing)
            # Directions are rotated in float64 here and with float32 angles in the models.
            torch.testing.assert_close(found.first_logits[row], logits, rtol=2e-5, atol=2e-5)
            assert found.tokens[row] == tokens


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("space", "part", "frame"),
    [
        ("kv", "keys", "content"),
        ("kv", "keys", "raw"),
        ("kv", "values", "content"),
        ("kv", "both", "content"),
        ("embedding", "", ""),
        ("hidden", "", ""),
    ],
)
def test_recomputed_without_a_cache(doubles: Any, space: str, part: str, frame: str, timing: str) -> None:
    model = doubles("llama")
    table, branches = random_edits(model, space, part, frame or "content", seed=1, size=6)
    check_against_oracle(model, table, branches, timing)


@pytest.mark.parametrize(
    ("kind", "family", "space", "timing"),
    [
        ("gpt2", "answer-only", "kv", "early-exit"),
        ("gpt2", "original", "embedding", "cached"),
        ("qwen2", "answer-only", "kv", "continue"),
        ("qwen3", "original-eos", "kv", "cached"),
        ("qwen3", "answer-only", "hidden", "continue"),
        ("mistral", "answer-only", "kv", "early-exit"),
        ("mistral", "original", "hidden", "cached"),
    ],
)
def test_recomputed_without_a_cache_every_kind(doubles: Any, kind: str, family: str, space: str, timing: str) -> None:
    model = doubles(kind, family)
    table, branches = random_edits(model, space, seed=2, size=4)
    check_against_oracle(model, table, branches, timing)


# --- Engines, drafts, batch sizes, order ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timing", TIMINGS)
def test_shared_equals_clones(doubles: Any, kind: str, timing: Any) -> None:
    model = doubles(kind, "original-eos" if kind == "qwen2" else "answer-only")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    for seed, space in enumerate(SPACES):
        # Coefficients of half a direction: some rows keep the answer of their prompt and confirm its draft.
        table, branches = random_edits(model, space, seed=seed, size=40, scale=0.5)
        options: dict[str, Any] = {"timing": timing, "max_new_tokens": MAX_NEW, "keep_first_logits": True}
        clones = decode_branches(model, run, table, branches, engine="clones", **options)
        plain = decode_branches(model, run, table, branches, drafts=False, **options)
        drafted = decode_branches(model, run, table, branches, drafts=True, **options)
        same_answers(plain, clones)
        same_answers(drafted, clones)
        assert 0 < sum(clones.finished) < len(branches), "answers that end early and answers that do not"
        assert len(set(clones.texts)) > len(QUESTIONS), "edits change answers"


@pytest.mark.parametrize("timing", ["early-exit", "continue", "cached"])
@pytest.mark.parametrize("space", ["kv", "embedding"])
def test_several_latents_per_row(doubles: Any, space: str, timing: Any) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, space, n_edits=2, size=30)
    options: dict[str, Any] = {"timing": timing, "max_new_tokens": MAX_NEW, "keep_first_logits": True}
    if (space, timing) == ("embedding", "cached"):
        with pytest.raises(UserError, match="one latent per row"):
            decode_branches(model, run, table, branches, **options)
        return
    shared = decode_branches(model, run, table, branches, **options)
    same_answers(shared, decode_branches(model, run, table, branches, engine="clones", **options))
    branches.direction[:, 1] = -1
    assert shared.tokens != decode_branches(model, run, table, branches, **options).tokens, "the second edit matters"


def test_any_batch_size_and_order(doubles: Any) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", size=24)
    whole = decode_branches(model, run, table, branches, max_new_tokens=MAX_NEW, keep_first_logits=True)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for size in (1, 7):
        for name in ("shared", "clones"):
            mixed = decode_branches(
                model, run, table, branches.select(order), max_new_tokens=MAX_NEW, batch_size=size, engine=name
            )
            assert [whole.tokens[i] for i in order] == mixed.tokens
            torch.testing.assert_close(whole.applied_norm[order], mixed.applied_norm)
            assert mixed.batch_size <= size


def test_padded_equals_alone(doubles: Any) -> None:
    model = doubles("llama")
    table, branches = random_edits(model, "kv", size=30)
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    together = decode_branches(model, run, table, branches, max_new_tokens=MAX_NEW, keep_first_logits=True)
    assert together.first_logits is not None
    for prompt, question in enumerate(QUESTIONS):
        rows = (branches.prompt == prompt).nonzero()[:, 0]
        mine = branches.select(rows)
        mine.prompt.zero_()
        run = model.rollout(model.encode([question]), N_LATENTS)
        alone = decode_branches(model, run, table, mine, max_new_tokens=MAX_NEW, keep_first_logits=True)
        assert alone.tokens == [together.tokens[i] for i in rows]
        torch.testing.assert_close(alone.first_logits, together.first_logits[rows])


@pytest.mark.parametrize("options", [{"mask": "published"}, {"attention": "eager"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_published_mask_and_eager_attention(doubles: Any, tiny_model: Any, kind: str, options: dict[str, str]) -> None:
    # Eager attention computes in float32 whatever the model's dtype.
    model = tiny_model(kind, **options) if "attention" in options else doubles(kind, **options)
    tolerance = 1e-4 if "attention" in options else 1e-9
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    for timing in TIMINGS:
        table, branches = random_edits(model, "kv", size=20)
        given: dict[str, Any] = {"timing": timing, "max_new_tokens": MAX_NEW, "keep_first_logits": True}
        shared = decode_branches(model, run, table, branches, **given)
        same_answers(shared, decode_branches(model, run, table, branches, engine="clones", **given), tolerance)
    assert model.attention == options.get("attention", "sdpa"), "the configured attention is back"


def test_attention_is_restored_after_an_error(doubles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(BranchCache, "attend", fails)
    with pytest.raises(RuntimeError, match="broken"):
        decode_branches(model, run, *random_edits(model, "kv"))
    assert model.attention == "sdpa"


# --- Coefficient 0, what was applied ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("space", SPACES)
def test_coefficient_zero_is_bit_identical(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, space: str, timing: Any, dtype: str
) -> None:
    model = tiny_model(dtype=dtype)
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, edited = random_edits(model, space, seed=4)
    zero = torch.zeros(len(edited))
    branches = Branches(edited.prompt, edited.latent, edited.direction.clamp(min=0), zero, zero)
    options: dict[str, Any] = {"timing": timing, "max_new_tokens": 2, "keep_first_logits": True}
    repeated = decode_branches(model, run, table, branches, **options)
    assert repeated.n_computed < len(branches), "unedited rows are computed once"
    # Computed one by one all the same, with and without a direction: not a bit differs.
    monkeypatch.setattr(engine, "has_edit", lambda branches, table: torch.ones(len(branches), dtype=torch.bool))
    monkeypatch.setattr(engine, "distinct_rows", lambda branches, table: (torch.arange(len(branches)),) * 2)
    with_zero = decode_branches(model, run, table, branches, drafts=False, **options)
    without = decode_branches(model, run, table, branches.without_edit(), drafts=False, **options)
    assert with_zero.n_computed == len(branches)
    assert with_zero.first_logits is not None and without.first_logits is not None
    assert torch.equal(with_zero.first_logits, without.first_logits)
    assert with_zero.tokens == without.tokens
    assert not with_zero.applied_norm.any()
    # The control: the same rows with their coefficients.
    other = decode_branches(model, run, table, edited, drafts=False, **options)
    assert not torch.equal(other.first_logits, without.first_logits)


def test_applied_norm(tiny_model: Any) -> None:
    model = tiny_model()
    run = model.rollout(model.encode(QUESTIONS[:1]), N_LATENTS)
    shape = (1, model.n_layers, model.n_kv_heads, model.d_head)
    ones = EditTable("kv", keys=torch.ones(shape), values=torch.ones(shape), keys_frame="raw")
    size = torch.ones(shape).numel()  # 3 layers, 2 kv-heads, 8: 48 numbers each in keys and values
    assert size == 48
    branches = Branches([0, 0, 0], [1, 2, 3], [0, 0, 0], [3.0, 0.0, -3.0], [0.0, 0.5, 4.0])  # type: ignore[arg-type]
    found = decode_branches(model, run, ones, branches, max_new_tokens=1).applied_norm
    expected = [3 * size**0.5, 0.5 * size**0.5, 5 * size**0.5]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    # A rotation keeps the norm, whatever the scale of the model's rotary embedding (1 here).
    content = dataclasses.replace(ones, keys_frame="content")
    torch.testing.assert_close(
        decode_branches(model, run, content, branches, max_new_tokens=1).applied_norm, found, rtol=1e-5, atol=0
    )
    # Replacing: the norm of the difference.
    vectors = EditTable("embedding", vectors=torch.ones(1, model.d_model))
    patch = Branches([0], [2], [0], [0.0], [1.5], [True])  # type: ignore[arg-type]
    replaced = decode_branches(model, run, vectors, patch, max_new_tokens=1).applied_norm
    assert float(replaced) == pytest.approx(float((1.5 - run.embeddings[0, 1]).norm()), rel=1e-5)


def test_applied_norm_after_rounding(tiny_model: Any) -> None:
    model = tiny_model(dtype="bfloat16")
    run = model.rollout(model.encode(QUESTIONS[:1]), N_LATENTS)
    values = torch.full((1, model.n_layers, model.n_kv_heads, model.d_head), 0.01)
    table = EditTable("kv", values=values)
    old = run.values[0, 1]
    rounded = (old.float() + 0.7 * values[0]).bfloat16()
    branches = Branches([0], [2], [0], [0.0], [0.7])  # type: ignore[arg-type]
    for name in ("shared", "clones"):
        found = decode_branches(model, run, table, branches, timing="cached", max_new_tokens=1, engine=name)
        expected = (rounded.double() - old.double()).norm()
        torch.testing.assert_close(found.applied_norm[0], expected)
        assert float(found.applied_norm[0]) != pytest.approx(float(0.7 * values.norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["shared", "clones"])
def test_an_edit_that_changes_nothing_is_an_error(tiny_model: Any, name: Any) -> None:
    model = tiny_model(dtype="bfloat16")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    values = torch.full((2, model.n_layers, model.n_kv_heads, model.d_head), 1e-30)
    values[1] = 1.0
    table = EditTable("kv", values=values)
    branches = Branches([0, 0], [1, 2], [1, 0], [0.0, 0.0], [1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="direction 0 at latent 2 .* changed nothing in torch.bfloat16"):
        decode_branches(model, run, table, branches, engine=name)
    decode_branches(model, run, table, branches.select([0]), engine=name, max_new_tokens=1)


def test_bfloat16_engines_agree(tiny_model: Any) -> None:
    model = tiny_model(dtype="bfloat16")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    for timing in TIMINGS:
        table, branches = random_edits(model, "kv")
        options: dict[str, Any] = {"timing": timing, "max_new_tokens": 1, "keep_first_logits": True}
        shared = decode_branches(model, run, table, branches, **options)
        clones = decode_branches(model, run, table, branches, engine="clones", **options)
        if timing != "continue":  # there later slots are computed, and rounded, by the branch
            assert torch.equal(shared.applied_norm, clones.applied_norm)
        assert shared.first_logits is not None and clones.first_logits is not None
        spread = clones.first_logits.float().std()
        error = (shared.first_logits.float() - clones.first_logits.float()).abs().mean()
        assert error < 0.03 * spread


# --- Nothing is computed twice, nothing is left behind ----------------------------------------------------------------


@pytest.mark.parametrize("drafts", [False, True])
def test_logits_only_where_they_are_read(doubles: Any, monkeypatch: pytest.MonkeyPatch, drafts: bool) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", size=60, scale=0.3)
    branches = branches.select((branches.direction >= 0).nonzero()[:, 0])
    branches = branches.select((branches.key_coefficient != 0).nonzero()[:, 0])
    rows: list[int] = []

    class Counting(CodiModel):
        def logits(self, h: Tensor) -> Tensor:
            rows.append(h.shape[0])
            return super().logits(h)

    counting = copy.copy(model)
    counting.__class__ = Counting
    found = decode_branches(counting, run, table, branches, max_new_tokens=MAX_NEW, drafts=drafts)
    tokens = sum(len(row) + done for row, done in zip(found.tokens, found.finished, strict=True))
    if drafts:
        kinds = len({(int(b), int(k)) for b, k in zip(branches.prompt, branches.latent, strict=True)})
        assert found.n_computed <= len(branches) + kinds
        assert tokens <= sum(rows) <= tokens + kinds * MAX_NEW
    else:
        assert found.n_computed == len(branches)
        assert sum(rows) == tokens, "finished rows have left the batch"


@pytest.mark.parametrize("n_edits", [1, 2])
@pytest.mark.parametrize(("space", "part"), [("kv", "both"), ("kv", "values"), ("embedding", "both")])
def test_mirrors_and_repeats_are_computed_once(doubles: Any, space: str, part: str, n_edits: int) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, rows = random_edits(model, space, part, seed=6, size=40, n_edits=n_edits)
    rows = rows.select(engine.has_edit(rows, table).nonzero()[:, 0])
    # A table with mirrors behind the directions, and last one that differs from the first in its smallest number only.
    parts = {name: getattr(table, name) for name in ("keys", "values", "vectors") if getattr(table, name) is not None}
    other = {name: x[:1].where(x[:1].abs() > x[:1].abs().min(), 0.0) for name, x in parts.items()}
    both = EditTable(table.space, **{name: torch.cat((x, -x, other[name])) for name, x in parts.items()})
    mirror = Branches(
        rows.prompt,
        rows.latent,
        rows.direction.where(rows.direction < 0, rows.direction + N_DIRECTIONS),
        -rows.key_coefficient,
        -rows.value_coefficient,
        rows.replace,
    )
    if n_edits > 1:  # nor does the order in which a row names its edits matter
        names = [field.name for field in dataclasses.fields(Branches)][1:]
        mirror = dataclasses.replace(mirror, **{name: getattr(mirror, name).flip(1) for name in names})
    near = dataclasses.replace(rows, direction=torch.full_like(rows.direction, 2 * N_DIRECTIONS))
    size = len(rows)
    merged = Branches(
        *(
            torch.cat([getattr(part, field.name) for part in (rows, mirror, rows, near)])
            for field in dataclasses.fields(Branches)
        )
    )
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW, "keep_first_logits": True, "drafts": False}
    found = decode_branches(model, run, both, merged, **options)
    assert found.n_computed == 2 * size
    same_answers(found, decode_branches(model, run, both, merged, engine="clones", **options))
    assert found.first_logits is not None
    for start in (size, 2 * size):
        assert torch.equal(found.first_logits[start : start + size], found.first_logits[:size])
    assert not torch.equal(found.first_logits[3 * size :], found.first_logits[:size])


def test_drafts_save_passes(doubles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", size=60, scale=1e-3)
    passes: list[int] = []
    feed = lm.generate.feed

    def counted(model: CodiModel, embeddings: Tensor, *rest: Any) -> Any:
        passes.append(embeddings.shape[0])
        return feed(model, embeddings, *rest)

    monkeypatch.setattr(lm.generate, "feed", counted)
    found = [
        decode_branches(model, run, table, branches, timing="cached", max_new_tokens=MAX_NEW, drafts=drafts)
        for drafts in (False, True)
    ]
    assert found[0].tokens == found[1].tokens
    passes.clear()
    decode_branches(model, run, table, branches, timing="cached", max_new_tokens=MAX_NEW, drafts=True)
    edited = [size for size in passes if size > len(QUESTIONS)]
    latents = len(set(branches.latent.tolist()))
    assert len(edited) == latents, "tiny edits change no answer: one pass per latent confirms all of them"


def test_the_run_is_not_modified(doubles: Any) -> None:
    model = doubles("llama")
    run: LatentRollout = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in run.past_key_values.layers]  # type: ignore[union-attr]
    for space in SPACES:
        for timing in TIMINGS:
            decode_branches(model, run, *random_edits(model, space), timing=timing, max_new_tokens=2)  # type: ignore[arg-type]
    for (keys, values), layer in zip(before, run.past_key_values.layers, strict=True):  # type: ignore[union-attr]
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)  # type: ignore[arg-type]


def test_memory_running_out_halves_the_batch(doubles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", size=60)
    expected = decode_branches(model, run, table, branches, max_new_tokens=2)
    decode = engine.decode_shared

    def limited(job: Any, rows: Branches, *rest: Any) -> Any:
        if len(rows) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return decode(job, rows, *rest)

    monkeypatch.setattr(engine, "decode_shared", limited)
    found = decode_branches(model, run, table, branches, max_new_tokens=2)
    assert found.tokens == expected.tokens
    assert found.batch_size <= 5 < expected.batch_size

    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine, "decode_shared", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        decode_branches(model, run, table, branches)


def test_long_answers_and_finished_rows_that_stay(doubles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own slots outgrow the columns kept free for them; rows that ended are still in the cache when others go on."""
    model = doubles("llama")
    run = model.rollout(model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(model, "kv", size=60)
    options: dict[str, Any] = {"max_new_tokens": 12, "drafts": False}
    expected = decode_branches(model, run, table, branches, engine="clones", max_new_tokens=12)
    assert len(set(map(len, expected.tokens))) > 2 and max(map(len, expected.tokens)) > 8
    for share in (0.0, 0.5, 1.0):  # finished rows stay to the end, for a while, not at all
        monkeypatch.setattr(engines, "_WORTH_KEEPING", share)
        found = decode_branches(model, run, table, branches, **options)
        assert found.tokens == expected.tokens and found.finished == expected.finished


@pytest.mark.parametrize("sizes", [[7], [1, 1, 1], [300, 3, 3], [64, 64, 64], [5, 90, 17, 90]])
def test_tiles(tiny_model: Any, sizes: list[int]) -> None:
    """Groups of any sizes: every row finds its own prefix and own slots, also after rows have left."""
    model = tiny_model()
    run = model.rollout(model.encode(QUESTIONS[: len(sizes)]), 1)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    columns = torch.arange(run.prompt_width)
    assert run.past_key_values is not None
    cache = BranchCache(
        run.past_key_values,
        torch.arange(len(sizes)),
        columns,
        run.attention_mask[:, :-1],
        groups,
        run.first_position - run.prompt_width,
        10**9,
    )
    rows = len(groups)
    own = torch.randn(rows, model.n_layers, model.n_kv_heads, model.d_head)
    cache.append(own, own + 1, torch.zeros(rows, dtype=torch.long))
    tiles = cache.n_tiles
    assert tiles * cache.width <= 2 * rows or tiles == len(sizes)

    def check(kept: Tensor) -> None:
        keys, values = cache.read_own(0)
        assert torch.equal(keys, own[kept]) and torch.equal(values, own[kept] + 1)
        query = torch.randn(len(kept), model.n_heads, 1, model.d_head)
        found = cache.attend(query, *cache._own[0], 0, 0.5)  # type: ignore[misc]
        for at, row in enumerate(kept.tolist()):
            visible = run.attention_mask[groups[row], :-1]
            layer = run.past_key_values.layers[0]  # type: ignore[union-attr]
            k = torch.cat((layer.keys[groups[row], :, :-1][:, visible], own[row, 0, :, None]), 1)  # type: ignore[index]
            v = torch.cat((layer.values[groups[row], :, :-1][:, visible], own[row, 0, :, None] + 1), 1)  # type: ignore[index]
            weights = (0.5 * query[at].view(2, 2, -1) @ k.transpose(1, 2)).softmax(-1)
            torch.testing.assert_close(found[at, 0], (weights @ v).flatten(0, 1))

    check(torch.arange(rows))
    kept = torch.arange(0, rows, 3)
    cache.select(kept)
    assert len(cache) == len(kept)
    check(kept)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [5]}, "prompt of a branch must be in 0..4, got 5"),
        ({"latent": [0]}, "latent of a branch must be in 1..4, got 0"),
        ({"latent": [5]}, "latent of a branch must be in 1..4, got 5"),
        ({"latent": [[2, 2]]}, "direction must be"),
        ({"direction": [7]}, r"direction of a branch must be in -1..4, got 7"),
        ({"key_coefficient": [float("nan")]}, "finite"),
        ({"value_coefficient": [1.0, 2.0]}, "value_coefficient must be"),
        ({"replace": [True]}, "replace is for embedding and hidden"),
    ],
)
def test_bad_rows(codi_model: CodiModel, change: dict[str, Any], message: str) -> None:
    run = codi_model.rollout(codi_model.encode(QUESTIONS), N_LATENTS)
    table, _ = random_edits(codi_model, "kv")
    row: dict[str, Any] = {"prompt": [0], "latent": [1], "direction": [0], "key_coefficient": [1.0]}
    row |= {"value_coefficient": [1.0], "replace": [False]}
    decode_branches(codi_model, run, table, Branches(**row), max_new_tokens=1)
    with pytest.raises(UserError, match=message):
        decode_branches(codi_model, run, table, Branches(**{**row, **change}), max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing": "late"}, "timing must be one of 'early-exit', 'continue', 'cached', got 'late'"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_bad_options(codi_model: CodiModel, options: dict[str, Any], message: str) -> None:
    run = codi_model.rollout(codi_model.encode(QUESTIONS), N_LATENTS)
    with pytest.raises(UserError, match=message):
        decode_branches(codi_model, run, *random_edits(codi_model, "kv"), **options)


def test_bad_tables(codi_model: CodiModel) -> None:
    run = codi_model.rollout(codi_model.encode(QUESTIONS), N_LATENTS)
    _, branches = random_edits(codi_model, "kv")
    small = torch.zeros(N_DIRECTIONS, codi_model.n_layers, codi_model.n_kv_heads, 3)
    with pytest.raises(UserError, match=r"keys of the table must be \(direction, \*\(3, 2, 8\)\)"):
        decode_branches(codi_model, run, EditTable("kv", keys=small), branches)
    with pytest.raises(UserError, match="takes keys, values or both"):
        EditTable("kv", vectors=small[:, 0, 0])
    with pytest.raises(UserError, match="takes vectors"):
        EditTable("embedding", keys=small)
    with pytest.raises(UserError, match="space must be one of"):
        EditTable("residual", vectors=small[:, 0, 0])  # type: ignore[arg-type]
    no_cache = codi_model.rollout(codi_model.encode(QUESTIONS), N_LATENTS, keep=("embeddings",))
    with pytest.raises(UserError, match="kept its cache"):
        decode_branches(codi_model, no_cache, None, branches.without_edit())


def test_no_rows(codi_model: CodiModel) -> None:
    run = codi_model.rollout(codi_model.encode(QUESTIONS), N_LATENTS)
    table, branches = random_edits(codi_model, "kv")
    found = decode_branches(codi_model, run, table, branches.select([]), max_new_tokens=2)
    assert found.tokens == [] and found.texts == [] and found.applied_norm.shape == (0,)
