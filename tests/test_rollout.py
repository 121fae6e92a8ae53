"""The latent loop against a float64 oracle, and what interventions may and may not do."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import KINDS
from oracle import Oracle

from codi import EncodedBatch, Intervention
from codi.rollout import KEEP
from lm.cache import cache_length, clone_cache, read_slots

N = 4
FAMILIES = ("answer-only", "original", "original-eos")


def close(found, expected, atol=2e-3):
    torch.testing.assert_close(found, expected.to(found.dtype), atol=atol, rtol=0)


def snapshot(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def assert_cache_equal(cache, expected):
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def assert_same_run(a, b):
    """Bit for bit."""
    for name in ("states", "embeddings", "hidden_states", "keys", "values", "attention_mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert_cache_equal(a.past_key_values, snapshot(b.past_key_values))


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_batch_is_the_float64_oracle(tiny_model, questions, kind, attention):
    model = tiny_model(kind, attention=attention)
    oracle = Oracle(model)
    batch = model.encode(questions)
    assert len(set(batch.lengths.tolist())) > 2
    run = model.rollout(batch, N, keep=(*KEEP, "prompt_hidden_states"))
    for row in range(len(questions)):
        ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
        x, states, cached = oracle.run(ids, N)
        length = len(ids)
        assert run.prompt_lengths[row] == run.first_position[row] == length
        close(run.embeddings[row], x[length:])
        close(run.hidden_states[row], states[length:])
        close(run.bot_hidden_states[row], states[length - 1])
        close(run.prompt_hidden_states[row, -length:], states[:length])
        close(run.states[row], states[length - 1 :, -1])
        for layer, (keys, values) in enumerate(cached):
            close(run.keys[row, :, layer], keys[:, length:].transpose(0, 1))
            close(run.values[row, :, layer], values[:, length:].transpose(0, 1))
            close(run.past_key_values.layers[layer].keys[row, :, -length - N :], keys)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_is_padded_and_padding_content_is_never_seen(tiny_model, questions, kind):
    model = tiny_model(kind)
    batch = model.encode(questions)
    run = model.rollout(batch, N)
    other = EncodedBatch(batch.input_ids.masked_fill(~batch.attention_mask, 7), batch.attention_mask)
    assert not torch.equal(other.input_ids, batch.input_ids)
    close(model.rollout(other, N).states, run.states, atol=1e-6)
    for row, text in enumerate(questions):
        alone = model.rollout(model.encode([text]), N)
        close(alone.hidden_states[0], run.hidden_states[row])
        close(alone.keys[0], run.keys[row])


def test_published_mask_lets_latents_see_the_padding(tiny_model, questions):
    """Also positions: GPT-2 counts them from the padded start."""
    for kind in ("llama", "gpt2"):
        model = tiny_model(kind, mask="published")
        batch = model.encode(questions)
        run = model.rollout(batch, 2)
        assert (run.first_position == batch.input_ids.shape[1]).all()
        other = EncodedBatch(batch.input_ids.masked_fill(~batch.attention_mask, 7), batch.attention_mask)
        padded = ~batch.attention_mask.all(dim=1)
        difference = (model.rollout(other, 2).states - run.states).abs().amax(dim=(1, 2))
        assert (difference[padded] > 1e-3).all() and (difference[~padded] == 0).all()
        alone = model.rollout(model.encode(questions[:1]), 2)
        assert torch.equal(alone.states, tiny_model(kind).rollout(model.encode(questions[:1]), 2).states)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_published_options_are_the_published_loop(tiny_model, questions, kind):
    """mask, rope = "published" in bfloat16, bit for bit: whole modules cast, mask to the prompt only, positions left to
    the model. Source: test.py of zhenyi4/codi."""
    options = {"dtype": "bfloat16", "mask": "published", "rope": "published"}
    model = tiny_model(kind, **options)
    exact = tiny_model(kind)
    base, prj = copy.deepcopy(exact.base).to(torch.bfloat16), copy.deepcopy(exact.prj).to(torch.bfloat16)
    batch = model.encode(questions)
    with torch.no_grad():
        ask = {"use_cache": True, "output_hidden_states": True}
        out = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **ask)
        states, embeddings = [out.hidden_states[-1][:, -1]], []
        for _ in range(N):
            # contiguous: in bfloat16 a linear layer rounds a strided input in another place
            embeddings.append(prj(out.hidden_states[-1][:, -1:].contiguous()))
            out = base(inputs_embeds=embeddings[-1], past_key_values=out.past_key_values, **ask)
            states.append(out.hidden_states[-1][:, -1])
    run = model.rollout(batch, N)
    assert torch.equal(run.states, torch.stack(states, dim=1))
    assert torch.equal(run.embeddings, torch.cat(embeddings, dim=1))
    carried = tiny_model(kind, dtype="bfloat16").rollout(batch, N)
    assert (carried.states - run.states).abs().max() > 0.05, "control: the default differs"


def test_bfloat16_stays_near(tiny_model, questions):
    exact, rounded = tiny_model(), tiny_model(dtype="bfloat16")
    a, b = (m.rollout(m.encode(questions), 1).states[:, 0] for m in (exact, rounded))
    assert b.dtype == torch.bfloat16
    assert (a - b.float()).norm() / a.norm() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cuda_is_the_cpu(tiny_model, questions, kind):
    here, there = tiny_model(kind), tiny_model(kind, device="cuda")
    runs = [m.rollout(m.encode(questions), N) for m in (here, there)]
    assert runs[1].states.device.type == "cuda"
    close(runs[1].to("cpu").hidden_states, runs[0].hidden_states)
    sampled = [m.answer(questions, seed=3, temperature=0.01, max_new_tokens=2) for m in (here, there)]
    assert sampled[0] == sampled[1]


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_zero_latents(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions), 0)
    assert run.n_latents == 0
    assert run.states.shape == (4, 1, 32)
    assert run.embeddings.shape == (4, 0, 32) and run.hidden_states.shape == (4, 0, 4, 32)
    assert run.keys.shape == (4, 0, 3, 2, 8)
    assert cache_length(run.past_key_values) == run.prompt_width


def test_only_what_is_asked_for_is_kept(tiny_model, questions):
    model = tiny_model(attention="eager")
    batch = model.encode(questions)
    width = batch.input_ids.shape[1]
    shapes = {
        "embeddings": (4, N, 32),
        "hidden_states": (4, N, 4, 32),
        "keys": (4, N, 3, 2, 8),
        "values": (4, N, 3, 2, 8),
        "attentions": (4, N, 3, 4, width + N),
        "prompt_hidden_states": (4, width, 4, 32),
    }
    whole = model.rollout(batch, N, keep=(*shapes, "cache"))
    for name in (*shapes, "cache"):
        run = model.rollout(batch, N, keep=(name,))
        attribute = {"cache": "past_key_values"}.get(name, name)
        kept = {a for a in (*shapes, "past_key_values") if getattr(run, a) is not None}
        assert kept == {attribute}
        assert (run.bot_hidden_states is not None) == (name == "hidden_states")
        if name in shapes:
            assert getattr(run, name).shape == shapes[name]
            assert torch.equal(getattr(run, name), getattr(whole, name))
    sums = whole.attentions.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    for k in range(1, N + 1):
        assert (whole.attentions[:, k - 1, ..., width + k :] == 0).all(), "no latent sees a later one"
    assert (whole.attentions.permute(0, 4, 1, 2, 3)[:, :width][~batch.attention_mask] == 0).all(), "nor the padding"


def test_bad_requests(codi_model, questions):
    batch = codi_model.encode(questions)
    with pytest.raises(ValueError, match="keep may hold .* got loss"):
        codi_model.rollout(batch, keep=("loss",))
    with pytest.raises(ValueError, match="attention='eager', got 'sdpa'"):
        codi_model.rollout(batch, keep=("attentions",))
    for n in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="n_latents must be a whole number, 0 or more"):
            codi_model.rollout(batch, n)
    prompt = codi_model.prefill(batch, keep=())
    with pytest.raises(ValueError, match="keep='hidden_states': the prefill did not keep it"):
        codi_model.rollout(prompt, 2)
    run = codi_model.rollout(prompt, 2, keep=("embeddings",))
    with pytest.raises(ValueError, match="only if it kept its cache"):
        codi_model.rollout(run, 3, keep=("embeddings",))
    with pytest.raises(ValueError, match="the run to continue did not keep it"):
        codi_model.rollout(codi_model.rollout(prompt, 2, keep=("cache",)), 3, keep=("embeddings",))
    with pytest.raises(ValueError, match="2 or more, got 1"):
        codi_model.rollout(codi_model.rollout(prompt, 2, keep=("cache",)), 1, keep=("cache",))


def test_a_text_that_is_too_long(tiny_model):
    model = tiny_model("gpt2")
    model.rollout(model.encode(["x" * 125]), 0)
    with pytest.raises(ValueError, match="130 positions are needed, .* has 128"):
        model.rollout(model.encode(["x" * 125]), 2)
    with pytest.raises(ValueError, match="positions are needed"):
        model.prefill(model.encode(["x" * 200]))


# --- Pieces of runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prefill_truncate_continue_and_select(tiny_model, questions, kind):
    """From a prefill = from the batch; truncated = fewer latents; continued = more; selected = those rows."""
    model = tiny_model(kind)
    batch = model.encode(questions)
    prompt = model.prefill(batch)
    before = snapshot(prompt.cache)
    whole = model.rollout(batch, N)
    assert_same_run(model.rollout(prompt, N), whole)
    for k in range(N + 1):
        part = model.rollout(prompt, k)
        assert_same_run(whole.truncate(k), part)
        assert_same_run(model.rollout(part, N), whole)
        assert torch.equal(part.bot_hidden_states, whole.bot_hidden_states)
    assert_cache_equal(prompt.cache, before)
    rows = [2, 0, 2]
    picked = whole.select(rows)
    for name in ("states", "keys", "embeddings", "prompt_lengths", "bot_hidden_states"):
        assert torch.equal(getattr(picked, name), getattr(whole, name)[rows]), name
    close(model.rollout(prompt.select(rows), N).states, picked.states, atol=1e-3)
    assert_same_run(whole.to("cpu"), whole)
    with pytest.raises(ValueError, match="n_latents must be in 0..4, got 5"):
        whole.truncate(5)
    keys, _ = read_slots(whole.past_key_values, whole.prompt_width, whole.prompt_width + N)
    assert torch.equal(keys, whole.keys)


def test_continuing_leaves_the_earlier_run_alone(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions), 2)
    before = snapshot(run.past_key_values)
    codi_model.rollout(run, 4)
    assert_cache_equal(run.past_key_values, before)
    assert run.n_latents == 2


# --- Encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_appends_the_protocol_and_no_words(tiny_model, family):
    model = tiny_model("llama", family)
    protocol = model.protocol
    question = [256, *(model.tokenizer.get_vocab()[c] for c in "2+2=")]
    for thought in ("latent", "direct", "verbal"):
        batch = model.encode(["2+2=", "12+2="], thought=thought)
        expected = question + list(protocol.before(thought))
        assert batch.input_ids[0].tolist() == [protocol.pad_id, *expected]
        assert batch.attention_mask[0].tolist() == [False] + [True] * len(expected)
        assert batch.lengths.tolist() == [len(expected), len(expected) + 1]
    assert len(batch) == 2 and torch.equal(batch.select([1]).input_ids[0], batch.input_ids[1])


def test_encode_refuses_nonsense(codi_model):
    for texts, message in (("one", "put it in a list"), ([], "at least one question"), ([3], "a string, got int")):
        with pytest.raises(ValueError, match=message):
            codi_model.encode(texts)
    with pytest.raises(ValueError, match="latent, direct, verbal, got 'loud'"):
        codi_model.encode(["a"], thought="loud")


# --- Interventions ----------------------------------------------------------------------------------------------------


class Recorder(Intervention):
    """Does nothing, and writes down that it was asked."""

    def __init__(self):
        self.calls = []

    def edit_prompt_layer(self, layer, x):
        self.calls.append(("prompt", layer, tuple(x.shape)))
        return x

    def edit_hidden(self, k, h):
        self.calls.append(("hidden", k, tuple(h.shape)))
        return h

    def edit_embedding(self, k, z):
        self.calls.append(("embedding", k, tuple(z.shape)))
        return z

    def edit_layer(self, k, layer, x):
        self.calls.append(("layer", k, layer, tuple(x.shape)))
        return x

    def edit_kv(self, k, layer, keys, values):
        self.calls.append(("kv", k, layer, tuple(keys.shape), tuple(values.shape)))
        return keys, values

    def edit_mask(self, k, mask):
        self.calls.append(("mask", k, tuple(mask.shape)))
        return mask


def test_doing_nothing_is_bit_identical_and_every_point_is_reached(codi_model, questions):
    batch = codi_model.encode(questions)
    width = batch.input_ids.shape[1]
    recorder = Recorder()
    run = codi_model.rollout(batch, 2, [recorder])
    assert_same_run(run, codi_model.rollout(batch, 2))
    row = (4, 32)
    expected = [("prompt", 0, (4, width, 32))]
    for layer in (1, 2, 3):
        expected += [("prompt", layer, (4, width, 32)), ("layer", 0, layer, row)]
    for k in (1, 2):
        expected += [("hidden", k, row), ("embedding", k, row), ("mask", k, (4, width + k))]
        expected += [("layer", k, layer, row) for layer in (1, 2, 3)]
        expected += [("kv", k, layer, (4, 2, 8), (4, 2, 8)) for layer in (1, 2, 3)]
    assert recorder.calls == expected


def edit(method, at, change):
    """An intervention with one method, active where its leading arguments equal `at`."""

    class Edit(Intervention):
        pass

    def act(self, *arguments):
        where, values = arguments[: len(at)], arguments[len(at) :]
        if where != at:
            return values[0] if len(values) == 1 else values
        return change(*values)

    setattr(Edit, method, act)
    return Edit()


def bump(x):
    """Tensors of the size of x's entries, the same at every call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)


EDITS = {
    # method, at, change, first latent whose hidden state (of any layer) differs
    "hidden": ("edit_hidden", (2,), lambda h: h + bump(h), 2),
    "embedding": ("edit_embedding", (2,), lambda z: z + bump(z), 2),
    "layer 2": ("edit_layer", (2, 2), lambda x: x + bump(x), 2),
    "last layer": ("edit_layer", (2, 3), lambda x: x + bump(x), 2),
    "bot layer": ("edit_layer", (0, 2), lambda x: x + bump(x), 1),
    "prompt layer": ("edit_prompt_layer", (1,), lambda x: x + bump(x), 1),
    "prompt embeddings": ("edit_prompt_layer", (0,), lambda x: x + bump(x), 1),
    "keys": ("edit_kv", (2, 1), lambda k, v: (k + bump(k), v), 3),
    "values": ("edit_kv", (2, 3), lambda k, v: (k, v + bump(v)), 3),
    "mask": ("edit_mask", (2,), lambda m: m & (torch.arange(m.shape[1]) >= m.shape[1] - 5), 2),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_what_follows_and_leaves_no_trace(tiny_model, questions, kind, name):
    method, at, change, first = EDITS[name]
    model = tiny_model(kind)
    if name == "last layer" and kind == "gpt2":
        at = (2, 2)  # it has two layers
    if name == "values" and kind == "gpt2":
        at = (2, 2)
    batch = model.encode(questions)
    prompt = model.prefill(batch)
    weights = {key: value.clone() for key, value in model.base.state_dict().items()}
    plain = model.rollout(batch, N)
    edited = model.rollout(batch, N, [edit(method, at, change)])
    assert torch.equal(edited.hidden_states[:, : first - 1], plain.hidden_states[:, : first - 1])
    for k in range(first, N + 1):
        assert (edited.states[:, k] - plain.states[:, k]).abs().max() > 1e-3, k
    slots = (edited.keys != plain.keys).flatten(3).any(dim=3) | (edited.values != plain.values).flatten(3).any(dim=3)
    assert not slots[:, : min(first, 2) - 1].any()
    # no trace
    assert_same_run(model.rollout(batch, N), plain)
    assert_same_run(model.rollout(prompt, N), plain)
    for key, value in model.base.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.blocks)


def test_hooks_are_removed_when_an_intervention_fails(codi_model, questions):
    class Broken(Intervention):
        def edit_layer(self, k, layer, x):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        codi_model.rollout(codi_model.encode(questions), 1, [Broken()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in codi_model.blocks)


def test_edits_do_what_they_say(codi_model, questions):
    """Replacing by hand what the loop computes, point by point, gives the values that were put there."""
    batch = codi_model.encode(questions)
    plain = codi_model.rollout(batch, N)

    h = bump(plain.states[:, 1])
    run = codi_model.rollout(batch, N, [edit("edit_hidden", (2,), lambda old: h)])
    assert torch.equal(run.embeddings[:, 1], codi_model.project(h).detach())
    assert torch.equal(run.states[:, 1], plain.states[:, 1]), "states are those before the edit"

    z = bump(plain.embeddings[:, 1])
    run = codi_model.rollout(batch, N, [edit("edit_embedding", (2,), lambda old: z)])
    assert torch.equal(run.embeddings[:, 1], z) and torch.equal(run.hidden_states[:, 1, 0], z)

    run = codi_model.rollout(batch, N, [edit("edit_layer", (2, 1), lambda old: z)])
    assert torch.equal(run.hidden_states[:, 1, 1], z) and torch.equal(
        run.hidden_states[:, 1, 0], plain.embeddings[:, 1]
    )

    run = codi_model.rollout(batch, N, [edit("edit_layer", (2, 3), lambda old: z)])
    normed = codi_model.decoder.norm(z).detach()
    torch.testing.assert_close(run.states[:, 2], normed)

    run = codi_model.rollout(batch, N, [edit("edit_layer", (0, 2), lambda old: z)], keep=KEEP)
    assert torch.equal(run.bot_hidden_states[:, 2], z)

    def keys_of_latent_1(keys, values):
        return plain.keys[:, 0, 1], values

    run = codi_model.rollout(batch, N, [edit("edit_kv", (3, 2), keys_of_latent_1)])
    assert torch.equal(run.keys[:, 2, 1], plain.keys[:, 0, 1])
    assert torch.equal(run.keys[:, 2, 0], plain.keys[:, 2, 0]), "the layer below is as it was"
    assert torch.equal(run.states[:, 3], plain.states[:, 3]) and not torch.equal(run.states[:, 4], plain.states[:, 4])


def test_a_masked_slot_is_as_if_it_were_not_there(codi_model, questions):
    """Latent 3 that may not see latents 1 and 2 does not care what they hold; a later latent does."""
    batch = codi_model.encode(questions)
    width = batch.input_ids.shape[1]

    def hide(mask):
        return mask & ~((torch.arange(mask.shape[1]) >= width) & (torch.arange(mask.shape[1]) < width + 2))

    z = bump(codi_model.rollout(batch, 1).embeddings[:, 0])
    fixed = edit("edit_embedding", (3,), lambda old: z)
    masked = edit("edit_mask", (3,), hide)
    spoilt = edit("edit_kv", (1, 1), lambda k, v: (k + 3, v - 3))
    a = codi_model.rollout(batch, N, [fixed, masked])
    b = codi_model.rollout(batch, N, [fixed, masked, spoilt])
    assert torch.equal(a.states[:, 3], b.states[:, 3])
    assert not torch.equal(a.states[:, 4], b.states[:, 4])
    c = codi_model.rollout(batch, N, [fixed, spoilt])
    assert not torch.allclose(a.states[:, 3], c.states[:, 3], atol=1e-2)


def test_interventions_are_applied_in_order(codi_model, questions):
    batch = codi_model.encode(questions[:1])
    double, one = (edit("edit_embedding", (1,), f) for f in (lambda z: 2 * z, lambda z: z + 1))
    z = codi_model.rollout(batch, 1).embeddings
    assert torch.equal(codi_model.rollout(batch, 1, [double, one]).embeddings, 2 * z + 1)
    assert torch.equal(codi_model.rollout(batch, 1, [one, double]).embeddings, 2 * (z + 1))


# --- Cache helpers ----------------------------------------------------------------------------------------------------


def test_clones_of_a_cache_are_independent(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions), 2)
    before = snapshot(run.past_key_values)
    shared, copied = clone_cache(run.past_key_values), clone_cache(run.past_key_values, copy=True)
    assert shared.layers[0].keys is run.past_key_values.layers[0].keys
    assert copied.layers[0].keys is not run.past_key_values.layers[0].keys
    for cache in (shared, copied):
        cache.update(torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 8), 0)
        assert cache_length(cache) == cache_length(run.past_key_values) + 1
    copied.layers[1].keys.zero_()
    assert_cache_equal(run.past_key_values, before)
