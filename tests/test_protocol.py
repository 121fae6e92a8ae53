"""Token order, ids and round trip of the protocols."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from codi import Protocol, UserError
from codi.protocol import answer_only, original


def test_original_takes_the_three_ids_after_the_vocabulary():
    """V = 100, eos 7, by hand."""
    plain, with_eos = original(100, 7), original(100, 7, with_eos=True)
    assert (plain.pad_id, plain.bot_id, plain.eot_id, plain.eos_id) == (100, 101, 102, 7)
    assert (plain.before_latents, plain.after_latents) == ((101,), (102,))
    assert (with_eos.before_latents, with_eos.after_latents) == ((7, 101), (102, 7))
    assert plain.excluded_logits == with_eos.excluded_logits == (102,), "the last of V + 3 ids"
    assert plain.before("direct") == plain.before("verbal") == ()
    assert (plain.name, with_eos.name, plain.answer_style) == ("original", "original-eos", "the-answer-is")


def test_answer_only_by_hand():
    found = answer_only(pad_id=10, bocot_id=11, eocot_id=12, eos_id=9)
    assert [found.before(t) for t in ("latent", "direct", "verbal")] == [(9, 11), (9, 12), (9,)]
    assert found.after_latents == (12,)
    assert found.excluded_logits == ()
    assert found.question_suffix == " Output only the answer and nothing else."
    assert found.token_ids == (9, 10, 11, 12)


@pytest.mark.parametrize("protocol", [original(5, 1), original(5, 1, True), answer_only(4, 5, 6, 3)])
def test_round_trip(protocol):
    assert Protocol.from_json(protocol.to_json()) == protocol
    assert Protocol.from_dict({**protocol.to_dict(), "name": "mine"}) != protocol


def test_is_frozen_and_hashable():
    protocol = original(5, 1)
    with pytest.raises(FrozenInstanceError):
        protocol.eos_id = 3  # type: ignore[misc]
    assert len({protocol, original(5, 1), original(6, 1)}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before_latents": ()}, "before_latents must hold at least one"),
        ({"after_latents": ()}, "after_latents must hold at least one"),
        ({"eos_id": -1}, "0 or more, got -1"),
        ({"answer_style": "essay"}, "answer_style must be .* got 'essay'"),
        ({"colour": 1}, "unknown fields colour"),
        ({"eos_id": None}, "missing fields eos_id"),
    ],
)
def test_impossible_values_are_refused(change, message):
    values = {**original(5, 1).to_dict(), **change}
    with pytest.raises(UserError, match=message):
        Protocol.from_dict({key: value for key, value in values.items() if value is not None})


def test_unknown_thought():
    with pytest.raises(UserError, match="latent, direct, verbal, got 'silent'"):
        original(5, 1).before("silent")  # type: ignore[arg-type]
