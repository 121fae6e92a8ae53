"""lm.edits: what is added where, nothing anywhere else, and no trace afterwards; lm.generate under edits."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from conftest import LM_KINDS, VOCABULARY
from steered_oracle import write

from lm.edits import Columns, Editing, ResidualEdit, edit_at, edited
from lm.errors import UserError
from lm.generate import generate
from lm.model import LanguageModel
from lm.terms import EditPositions
from lm.text import EncodedBatch

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]
RULES = get_args(EditPositions)


def vectors_for(model, rows: int, size: float = 2.0) -> torch.Tensor:
    return size * torch.randn(rows, model.d_model, generator=torch.Generator().manual_seed(3))


def ids_of(batch: EncodedBatch, row: int) -> list[int]:
    return batch.input_ids[row][batch.attention_mask[row]].tolist()


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules())


# --- One edit ---------------------------------------------------------------------------------------------------------


def test_adds_the_vector_where_it_is_told_to():
    x = torch.randn(2, 3, 4)
    edit = ResidualEdit(1, torch.ones(2, 4), torch.tensor([0.5, -2.0]))
    assert torch.equal(edit.apply(x), x + torch.tensor([0.5, -2.0])[:, None, None])
    where = torch.tensor([[True, False, True], [False, False, True]])
    found = edit.apply(x, where)
    assert torch.equal(found[~where], x[~where])
    assert torch.equal(found[where], edit.apply(x)[where])
    one = ResidualEdit(1, torch.ones(4), 0.5)
    assert torch.equal(one.apply(x), x + 0.5)


def test_normalised_edits_keep_the_norm_and_turn_the_state():
    x = torch.randn(2, 3, 4)
    vectors = torch.randn(2, 4)
    found = ResidualEdit(1, vectors, 3.0, normalise=True).apply(x)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    plain = ResidualEdit(1, vectors, 3.0).apply(x)
    assert not torch.allclose(plain.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(found, plain, dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32_and_rounded_once(dtype):
    x = torch.randn(1, 50, 64).to(dtype)
    vector = torch.randn(64)
    found = ResidualEdit(1, vector, 0.3).apply(x)
    assert found.dtype == dtype
    assert torch.equal(found, (x.float() + 0.3 * vector).to(dtype))
    assert not torch.equal(found, x + (0.3 * vector).to(dtype)), "the same as a sum in the model's dtype"


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficient_zero_leaves_every_bit(dtype, normalise):
    x = torch.tensor([[[-0.0, 0.0, 1.0, -3e-39], [1.0, 2.0, 3.0, 5.0]]] * 2).to(dtype)
    edit = ResidualEdit(1, torch.full((4,), 1.7), torch.tensor([0.0, 1.0]), normalise=normalise)
    found = edit.apply(x)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found[0].view(bits), x[0].view(bits))
    assert not torch.equal(found[1], x[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "some"}, "positions must be one of all, prompt, generated, last, once, answer, got 'some'"),
        ({"vectors": torch.ones(2, 3, 4)}, r"got shapes \(2, 3, 4\) and \(\)"),
        ({"coefficients": torch.ones(3)}, "a vector and a coefficient per row, got 2 and 3"),
        ({"vectors": torch.tensor([1.0, float("nan")])}, "must be finite numbers"),
        ({"coefficients": float("inf")}, "must be finite numbers"),
    ],
)
def test_edits_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        ResidualEdit(**{"layer": 1, "vectors": torch.ones(2, 4), "coefficients": 1.0, **arguments})
    assert "\n" not in str(caught.value)


# --- Which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "prompt", "later"),
    [
        ("all", [[0, 1, 1], [1, 1, 1]], [1, 1]),
        ("prompt", [[0, 1, 1], [1, 1, 1]], [0, 0]),
        ("generated", [[0, 0, 0], [0, 0, 0]], [1, 1]),
        ("last", [[0, 0, 1], [0, 0, 1]], [0, 0]),
        ("once", [[0, 0, 0], [0, 0, 0]], [1, 0]),
        ("answer", [[0, 0, 1], [0, 0, 1]], [1, 1]),
    ],
)
def test_positions(positions, prompt, later):
    """A padded prompt of 3 columns, then two tokens one by one; in one pass over all five columns it is the same."""
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    edits = [ResidualEdit(1, torch.ones(4), 1.0, positions)]
    editing = Editing(edits, prompt=3)
    zeros = torch.zeros(2, 3, 4)

    def touched(edit, x):
        return [[0] * x.shape[1]] * 2 if edit is None else edit(1, x)[..., 0].int().tolist()

    assert touched(editing.next(3, mask[:, :3]), zeros) == prompt
    steps = [touched(editing.next(1), zeros[:, :1]) for _ in later]
    assert steps == [[[step]] * 2 for step in later]
    whole = touched(edit_at(edits, Columns(0, 5, 3, mask)), torch.zeros(2, 5, 4))
    assert whole == [row + later for row in prompt]


def test_last_token_of_a_text_that_is_padded_on_the_right():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    chosen = Columns(0, 3, 3, mask).chosen("last", torch.device("cpu"))
    assert chosen.int().tolist() == [[0, 1, 0], [0, 0, 1]]


# --- Writing under edits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", RULES)
@pytest.mark.parametrize("kind", LM_KINDS)
def test_cached_uncached_alone_and_in_a_batch(language_model, kind, positions):
    """lm.generate with a row each, Hugging Face's generate with and without a cache, and the oracle write the same."""
    model = language_model(kind)
    batch = model.encode(TEXTS)
    layer, vectors = model.n_layers - 1, vectors_for(model, 4, 20.0 if kind == "gemma" else 2.0)
    coefficients = torch.tensor([1.0, -0.7, 2.0, 0.0])
    edit = ResidualEdit(layer, vectors, coefficients, positions)
    found = generate(model, batch, 5, edits=edit, end_ids=(), batch_size=3, keep_first_logits=True)
    plain = generate(model, batch, 5, end_ids=(), keep_first_logits=True)
    for row in range(4):
        given = [(layer, vectors[row], float(coefficients[row]), positions, False)]
        tokens, first = write(model.base, model.blocks, ids_of(batch, row), given, 5)
        assert found.tokens[row] == tokens
        torch.testing.assert_close(found.first_logits[row], first, atol=2e-5, rtol=1e-5)
    assert found.tokens[:3] != plain.tokens[:3], "the edits change nothing that is written"
    assert torch.equal(found.first_logits[3], generate(model, batch, 1, end_ids=(), edits=ResidualEdit(
        layer, vectors, torch.zeros(4), positions), batch_size=3, keep_first_logits=True).first_logits[3])  # fmt: skip
    for use_cache in (True, False) if kind in ("llama", "gpt2") else ():
        with edited(model, edit):
            written = model.base.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), max_new_tokens=5,
                min_new_tokens=5, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        assert written[:, -5:].tolist() == found.tokens
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_zero_is_no_edit_bit_for_bit(language_model, kind):
    model = language_model(kind)
    batch = model.encode(TEXTS)
    plain = generate(model, batch, 4, end_ids=(), keep_first_logits=True)
    for normalise in (False, True):
        edit = ResidualEdit(2, vectors_for(model, 4), torch.zeros(4), normalise=normalise)
        found = generate(model, batch, 4, end_ids=(), edits=edit, keep_first_logits=True)
        assert torch.equal(found.first_logits, plain.first_logits) and found.tokens == plain.tokens


def test_edits_of_pads_change_nothing(language_model):
    """A padded text under an edit of all its tokens gives what it gives without any padding; more pads, the same."""
    model = language_model()
    ids = ids_of(model.encode(TEXTS[:1]), 0)
    edit = ResidualEdit(1, vectors_for(model, 1)[0], 1.5)
    alone = generate(model, model.encode(TEXTS[:1]), 3, end_ids=(), edits=edit, keep_first_logits=True)
    for pads in (1, 7):
        padded = EncodedBatch(torch.tensor([[0] * pads + ids]), torch.tensor([[False] * pads + [True] * len(ids)]))
        found = generate(model, padded, 3, end_ids=(), edits=edit, keep_first_logits=True)
        torch.testing.assert_close(found.first_logits, alone.first_logits, atol=1e-5, rtol=1e-5)
        x = torch.zeros(1, pads + len(ids), model.d_model)
        changed = edit_at([edit], Columns(0, x.shape[1], x.shape[1], padded.attention_mask))(1, x)
        assert not changed[0, :pads].any() and changed[0, pads:].any(dim=-1).all()


def test_edits_of_one_layer_add_up_and_layers_act_one_after_the_other(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    a, b, c = vectors_for(model, 3)
    together = generate(
        model, batch, 3, end_ids=(), keep_first_logits=True,
        edits=[ResidualEdit(1, a, 0.5), ResidualEdit(1, b, 1.0), ResidualEdit(3, c, 1.0)],
    )  # fmt: skip
    summed = generate(
        model, batch, 3, end_ids=(), keep_first_logits=True,
        edits=[ResidualEdit(1, 0.5 * a + b, 1.0), ResidualEdit(3, c, 1.0)],
    )  # fmt: skip
    torch.testing.assert_close(together.first_logits, summed.first_logits, atol=1e-5, rtol=1e-5)
    with edited(model, ResidualEdit(1, a, 0.5)), edited(model, [ResidualEdit(1, b, 1.0), ResidualEdit(3, c, 1.0)]):
        nested = generate(model, batch, 3, end_ids=(), keep_first_logits=True)
    torch.testing.assert_close(together.first_logits, nested.first_logits, atol=1e-5, rtol=1e-5)
    given = [(1, a, 0.5, "all", False), (1, b, 1.0, "all", False), (3, c, 1.0, "all", False)]
    tokens, first = write(model.base, model.blocks, ids_of(batch, 1), given, 3)
    torch.testing.assert_close(together.first_logits[1], first, atol=1e-5, rtol=1e-5)
    assert together.tokens[1] == nested.tokens[1] == tokens


def test_draws_depend_on_seed_and_text_only(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    edit = ResidualEdit(2, vectors_for(model, 4), torch.tensor([0.1, 0.5, -0.3, 0.2]))
    one, other = (
        generate(model, batch, 6, temperature=1.0, seed=5, edits=edit, end_ids=(), batch_size=size) for size in (1, 4)
    )
    assert one.tokens == other.tokens
    assert one.tokens != generate(model, batch, 6, temperature=1.0, seed=6, edits=edit, end_ids=()).tokens


def test_no_hook_is_left_after_an_error(language_model):
    model = language_model()
    before = hooks(model)
    with pytest.raises(RuntimeError, match="mine"), edited(model, ResidualEdit(1, torch.ones(model.d_model), 1.0)):
        assert hooks(model) > before
        raise RuntimeError("mine")
    assert hooks(model) == before
    batch = model.encode(TEXTS)
    with pytest.raises(UserError, match="an edit made for 3 rows was given a batch of 4"):
        with edited(model, ResidualEdit(1, torch.ones(3, model.d_model), 1.0)):
            model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert hooks(model) == before


def test_what_cannot_be_told_is_refused(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    vector = torch.ones(model.d_model)
    with pytest.raises(UserError, match=r"layer of an edit must be in 1\.\.3, got 0"):
        generate(model, batch, 1, edits=ResidualEdit(0, vector, 1.0))
    with (
        pytest.raises(UserError, match=r"layer of an edit must be in 1\.\.3, got 4"),
        edited(model, ResidualEdit(4, vector, 1.0)),
    ):
        pass
    with pytest.raises(UserError, match="vectors of an edit must have width 32, got 5"):
        generate(model, batch, 1, edits=ResidualEdit(1, torch.ones(5), 1.0))
    with torch.no_grad():
        step = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=True)
        more = torch.cat((batch.attention_mask, torch.ones(4, 2, dtype=torch.bool)), dim=1)
        fed = {"input_ids": batch.input_ids[:, -2:], "attention_mask": more, "past_key_values": step.past_key_values}
        with pytest.raises(UserError, match="2 tokens were fed after a cache that holds"):
            with edited(model, ResidualEdit(1, vector, 1.0, "generated")):
                model.base(**fed)
        with edited(model, ResidualEdit(1, vector, 1.0, "all")):
            model.base(**fed)
        with pytest.raises(UserError, match="need an attention mask"):
            with edited(model, ResidualEdit(1, vector, 1.0)):
                model.base(input_ids=batch.input_ids, attention_mask=torch.zeros(4, 1, 3, 3))


# --- Stop strings -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are letters; the last two ids are special and have no text."""

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(ord("a") + token % 26) for token in tokens if token < VOCABULARY - 2)


def test_stop_strings_end_a_row_and_are_cut_off(language_model):
    """Rows stop at the token that completes the text, also where several tokens make it; others write on."""
    bytewise = language_model()
    batch = bytewise.encode(TEXTS)
    model = LanguageModel(bytewise.base, Letters(), name="letters")
    given = {"max_new_tokens": 20, "temperature": 1.0, "seed": 4, "end_ids": ()}
    free = generate(model, batch, **given)
    assert all(len(text) >= 15 and not done for text, done in zip(free.texts, free.finished, strict=True))
    stop = free.texts[1][5:7]
    found = generate(model, batch, **given, stop=[stop, "never written"], batch_size=3)
    assert found.finished[1] and stop in free.texts[1]
    for row, text in enumerate(free.texts):
        at = text.find(stop)
        assert found.texts[row] == (text if at < 0 else text[:at])
        written = model.tokenizer.decode(found.tokens[row], skip_special_tokens=True)
        assert written == (text if at < 0 else text[: at + 2])
        assert found.finished[row] == (at >= 0)
    assert not all(found.finished), "every row stopped"


@pytest.mark.parametrize("stop", ["abc", ["a", ""], [3]])
def test_stop_must_be_a_list_of_texts(language_model, stop):
    with pytest.raises(UserError, match="stop must be a list of texts"):
        generate(language_model(), TEXTS, 2, stop=stop)
