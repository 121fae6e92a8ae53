"""Lenses: the last layer is the model, an untrained tuned lens is the logit lens, saved lenses load in tuned_lens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tuned_lens.nn import LogitLens, TunedLens, Unembed

from codi import CodiModel
from lenses import (
    TEXT,
    LatentLens,
    latent_states,
    lens_positions,
    load_lenses,
    new_lens,
    save_lens,
    text_states,
    unembed,
)
from lenses.latent_lens import choose_lens

KNOWN = ("llama", "gpt2")  # base models that tuned_lens's own Unembed accepts
KINDS = ("llama", "gpt2", "qwen2", "qwen3", "mistral")


def random_lens(model: CodiModel, shared: Unembed, seed: int = 0) -> TunedLens:
    generator = torch.Generator().manual_seed(seed)
    lens = new_lens(model, shared)
    for translator in lens:
        translator.weight.data = 0.1 * torch.randn(translator.weight.shape, generator=generator)
        translator.bias.data = 0.1 * torch.randn(translator.bias.shape, generator=generator)
    return lens.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_is_the_model(tiny_model: Callable[..., CodiModel], kind: str, questions: list[str]) -> None:
    model = tiny_model(kind)
    run = model.rollout(model.encode(questions), 3)
    assert run.hidden_states is not None
    shared = unembed(model)
    lens = LatentLens(shared, model.n_layers, random_lens(model, shared))
    last = run.hidden_states[:, :, -1]
    torch.testing.assert_close(lens.logits(last, model.n_layers, 1), model.logits(last))
    # the control: norm weights are not one, so norming a second time would be seen
    assert (shared.final_norm.weight - 1).abs().max() > 0.1
    assert (shared(last) - model.logits(last)).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_last_block_through_the_lens_is_the_model(tiny_model: Callable[..., CodiModel], kind: str) -> None:
    """The state after the last block, before the norm, read with norm: caught inside the model."""
    model = tiny_model(kind)
    batch = model.encode(["3+4=?"])
    caught = []
    handle = model.blocks[-1].register_forward_hook(
        lambda module, args, out: caught.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        logits = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    handle.remove()
    torch.testing.assert_close(unembed(model)(caught[0]), logits)


@pytest.mark.parametrize("kind", KNOWN)
def test_unembed_is_that_of_tuned_lens(tiny_model: Callable[..., CodiModel], kind: str) -> None:
    model = tiny_model(kind)
    x = torch.randn(5, model.d_model)
    torch.testing.assert_close(unembed(model)(x), Unembed(model.base)(x))
    assert unembed(model).unembedding_hash() == Unembed(model.base).unembedding_hash()


def test_untrained_tuned_lens_is_the_logit_lens(codi_model: CodiModel, questions: list[str]) -> None:
    run = codi_model.rollout(codi_model.encode(questions), 3)
    shared = unembed(codi_model)
    plain, tuned = LatentLens.plain(codi_model), LatentLens(shared, codi_model.n_layers, new_lens(codi_model, shared))
    other = LatentLens(shared, codi_model.n_layers, random_lens(codi_model, shared))
    for layer in range(codi_model.n_layers + 1):
        states = latent_states(run)
        assert torch.equal(plain.log_probs(states, layer), tuned.log_probs(states, layer))
        assert torch.equal(plain.log_probs(states, layer), other.log_probs(states, layer)) == (
            layer == codi_model.n_layers
        )
    torch.testing.assert_close(
        plain.logits(run.hidden_states[:, 1, 1], 1, 2),
        LogitLens(Unembed(codi_model.base))(run.hidden_states[:, 1, 1], 1),
    )


def test_each_position_is_read_by_its_own_translators(codi_model: CodiModel, questions: list[str]) -> None:
    shared = unembed(codi_model)
    lenses = {position: random_lens(codi_model, shared, position) for position in (1, 3)}
    lens = LatentLens(shared, codi_model.n_layers, lenses, name="each")
    run = codi_model.rollout(codi_model.encode(questions), 3)
    states = latent_states(run, [1, 3])
    found = lens.log_probs(states, 2)
    for position in (1, 3):
        rows = states.position == position
        expected = lenses[position](run.hidden_states[:, position - 1, 2], 2).log_softmax(-1)
        torch.testing.assert_close(found[rows], expected)
    assert lens.reads(3) and not lens.reads(2)
    with pytest.raises(ValueError, match="reads positions 1, 3, not 2"):
        lens.logits(run.hidden_states[:, 1, 2], 2, 2)


def test_difference_leaves_the_bias_out(codi_model: CodiModel) -> None:
    shared = unembed(codi_model)
    tuned = random_lens(codi_model, shared)
    lens = LatentLens(shared, codi_model.n_layers, tuned)
    x, y = torch.randn(2, codi_model.d_model)
    moved = tuned.transform_hidden(x, 1) - tuned.transform_hidden(y, 1)
    torch.testing.assert_close(lens.difference_logits(x - y, 1, 1), shared(moved), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens.difference_logits(x - y, 1, 1, bias=True), tuned(x - y, 1))
    last = codi_model.n_layers
    torch.testing.assert_close(lens.difference_logits(x - y, last, 1), codi_model.logits(x - y))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_lens_loads_in_tuned_lens(tiny_model: Callable[..., CodiModel], kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    shared = unembed(model)
    lens = random_lens(model, shared)
    save_lens(lens, tmp_path / "3", "3", (3,), note="x")
    save_lens(random_lens(model, shared, 1), tmp_path / "all", "all", (1, 2, 3))
    saved = load_lenses(tmp_path, model, shared)
    assert saved["3"].positions == (3,) and saved["3"].record == {"note": "x"}
    if kind in KNOWN:
        theirs = TunedLens.from_model_and_pretrained(model.base, str(tmp_path / "3"))
    else:  # tuned_lens does not know these base models; its loader reads the folder all the same
        with pytest.raises(NotImplementedError):
            Unembed(model.base)
        theirs = TunedLens.from_unembed_and_pretrained(shared, str(tmp_path / "3"))
    x = torch.randn(4, model.d_model)
    mine = choose_lens("3", saved, model, shared)
    each = choose_lens("each", saved, model, shared)
    for layer in range(model.n_layers):
        torch.testing.assert_close(mine.logits(x, layer, 5), theirs(x, layer))
        torch.testing.assert_close(each.logits(x, layer, 3), theirs(x, layer))
    assert not torch.equal(choose_lens("all", saved, model, shared).logits(x, 0, 3), mine.logits(x, 0, 3))


def test_lens_of_another_model_is_refused(
    codi_model: CodiModel, tiny_model: Callable[..., CodiModel], tmp_path: Path
) -> None:
    shared = unembed(codi_model)
    save_lens(new_lens(codi_model, shared), tmp_path / "all", "all", (1,))
    other = tiny_model("gpt2")
    with pytest.raises(ValueError, match="has 32 and 2"):
        load_lenses(tmp_path, other, unembed(other))
    twin = tiny_model("mistral")
    with pytest.raises(ValueError, match="trained for another model"):
        load_lenses(tmp_path, twin, unembed(twin))
    with pytest.raises(ValueError, match="run codi lens train first"):
        load_lenses(tmp_path / "nothing", codi_model, shared)
    with pytest.raises(ValueError, match="no lens 'odd'; there are: plain, all"):
        choose_lens("odd", load_lenses(tmp_path, codi_model, shared), codi_model, shared)


def test_published_names_are_shifted_by_one() -> None:
    assert lens_positions("3", 6) == (3,)
    assert lens_positions("published 3", 6) == lens_positions("3", 6, "published") == (4,)
    assert lens_positions("3 and 5", 6) == lens_positions("5,3", 6) == lens_positions("3-and-5", 6) == (3, 5)
    assert lens_positions("published 3 and 5", 6) == (4, 6)
    assert lens_positions("odd", 6) == lens_positions("published even", 6) == (1, 3, 5)
    assert lens_positions("even", 6) == lens_positions("published odd", 6) == (2, 4, 6)
    assert lens_positions("all", 6) == lens_positions("published all", 6) == (1, 2, 3, 4, 5, 6)
    assert lens_positions("published 0", 6) == (1,) and lens_positions("0", 6) == (0,)
    assert lens_positions("text", 6) == (TEXT,)
    for name, message in (
        ("7", "7 is not in 0..6"),
        ("published 6", "6 is not in 0..5"),
        ("third", "a lens is named"),
    ):
        with pytest.raises(ValueError, match=message):
            lens_positions(name, 6)


def test_states_of_latents_and_text(codi_model: CodiModel, questions: list[str]) -> None:
    batch = codi_model.encode(questions)
    start = codi_model.prefill(batch, keep=("hidden_states", "prompt_hidden_states"))
    run = codi_model.rollout(start, 2, keep=("hidden_states",))
    states = latent_states(run)
    assert states.position.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(states.hidden[:, -1], run.states.transpose(0, 1).reshape(12, -1))
    leave = len(codi_model.protocol.before_latents)
    text = text_states(start, 3, leave, torch.Generator().manual_seed(0))
    assert text.position.tolist() == [TEXT] * len(text) and text.prompt.bincount().tolist() == [3] * 4
    short = len(codi_model.tokenizer(questions[2])["input_ids"])
    every = text_states(start, 1000, leave)
    assert int((every.prompt == 2).sum()) == short  # padding and protocol tokens are no text
    alone = codi_model.prefill(codi_model.encode([questions[2]]), keep=("prompt_hidden_states",))
    torch.testing.assert_close(
        every.hidden[every.prompt == 2], text_states(alone, 1000, leave).hidden, atol=1e-4, rtol=1e-4
    )


def test_bfloat16_model_has_float32_lenses(tiny_model: Callable[..., CodiModel]) -> None:
    model = tiny_model(dtype="bfloat16")
    lens = new_lens(model, unembed(model))
    assert lens[0].weight.dtype == torch.float32
    assert lens(torch.randn(2, model.d_model), 0).dtype == torch.float32
    assert model.dtype == torch.bfloat16  # the model itself is as it was


def test_unknown_norm_is_one_clear_line(codi_model: CodiModel) -> None:
    broken = copy.copy(codi_model)
    broken.decoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no final norm found in Linear"):
        unembed(broken)
