"""How a checkpoint family asks and answers: token order, ids, excluded logits and answer style.

A :class:`Protocol` is a small frozen record that belongs to a checkpoint and is saved beside results. It knows token
ids and nothing else: no model, no tokenizer object, no data set. The named families are

=============  ==========================================  =====================  ==========================
name           fed before the latents                      fed after the latents  the answer
=============  ==========================================  =====================  ==========================
original       question, bot                               eot                    "The answer is: 42", eos
original-eos   question, eos, bot                          eot, eos               "The answer is: 42", eos
answer-only    question, eos, bocot                        eocot                  "42", eos
=============  ==========================================  =====================  ==========================

Source: zhenyi4/codi (original; `remove_eos` drops the eos), bcywinski/codi_llama1b-answer_only (answer-only).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, SupportsIndex, get_args

from lm.errors import UserError
from lm.terms import ANSWER_MODES, AnswerMode, ProtocolName

__all__ = ["FAMILIES", "PROTOCOL_TOKENS", "Protocol", "UserError", "answer_only", "original"]

FAMILIES: tuple[ProtocolName, ...] = get_args(ProtocolName)
PROTOCOL_TOKENS = ("[PAD]", "<|bocot|>", "<|eocot|>")
"""Names of pad, begin-of-thought and end-of-thought in a tokenizer of the answer-only family."""

ANSWER_ONLY_SUFFIX = " Output only the answer and nothing else."


@dataclass(frozen=True)
class Protocol:
    """Token order and ids of one checkpoint.

    Attributes:
        name: one of "original", "original-eos", "answer-only", or the name of a protocol of your own.
        pad_id, bot_id, eot_id, eos_id: padding, begin of thought, end of thought, end of text.
        before_latents: fed after the question, before latent 1; its last token is the one whose state is h_0.
        after_latents: fed after the last latent, before the answer.
        before_direct: fed after the question when the model answers without a thought.
        before_verbal: fed after the question when the model writes its chain of thought.
        excluded_logits: vocabulary ids that are never an answer token.
        answer_style: "number" (the bare number) or "the-answer-is" ("The answer is: 42").
        question_suffix: sentence that ended every training question. Data-set readers append it; `encode` never does.
    """

    name: str
    pad_id: int
    bot_id: int
    eot_id: int
    eos_id: int
    before_latents: tuple[int, ...]
    after_latents: tuple[int, ...]
    before_direct: tuple[int, ...] = ()
    before_verbal: tuple[int, ...] = ()
    excluded_logits: tuple[int, ...] = ()
    answer_style: Literal["number", "the-answer-is"] = "number"
    question_suffix: str = ""

    def __post_init__(self) -> None:
        for field in ("before_latents", "after_latents", "before_direct", "before_verbal", "excluded_logits"):
            ids = getattr(self, field)
            if isinstance(ids, str) or not isinstance(ids, Iterable) or not all(map(_is_whole, ids := tuple(ids))):
                raise UserError(f"protocol: {field} must be token ids, got {getattr(self, field)!r}"[:300])
            object.__setattr__(self, field, tuple(int(i) for i in ids))
        for field in ("pad_id", "bot_id", "eot_id", "eos_id"):
            if not _is_whole(getattr(self, field)):
                raise UserError(f"protocol: {field} must be a token id, got {getattr(self, field)!r}"[:300])
        for field in ("name", "question_suffix"):
            if not isinstance(getattr(self, field), str):
                raise UserError(f"protocol: {field} must be a text, got {getattr(self, field)!r}"[:300])
        if not self.before_latents:
            raise UserError(
                "protocol: before_latents must hold at least one token (the begin-of-thought token), got none"
            )
        if not self.after_latents:
            raise UserError("protocol: after_latents must hold at least one token (the end-of-thought token), got none")
        if self.answer_style not in ("number", "the-answer-is"):
            raise UserError(f"protocol: answer_style must be 'number' or 'the-answer-is', got {self.answer_style!r}")
        negative = [i for i in self.token_ids if i < 0]
        if negative:
            raise UserError(f"protocol: token ids must be 0 or more, got {negative[0]}")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every vocabulary id that the protocol names, each once, ascending."""
        ids = {self.pad_id, self.bot_id, self.eot_id, self.eos_id}
        ids.update(self.before_latents, self.after_latents, self.before_direct, self.before_verbal)
        ids.update(self.excluded_logits)
        return tuple(sorted(ids))

    def before(self, thought: AnswerMode) -> tuple[int, ...]:
        """Tokens that follow the question for a latent, direct (no thought) or verbal (written) chain of thought."""
        if thought not in ANSWER_MODES:
            raise UserError(f"thought must be one of {', '.join(ANSWER_MODES)}, got {thought!r}")
        return {"latent": self.before_latents, "direct": self.before_direct, "verbal": self.before_verbal}[thought]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Protocol.from_dict` is the way back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """The protocol that `to_dict` wrote.

        Raises:
            UserError: an unknown or missing field.
        """
        names = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise UserError(f"protocol: unknown fields {', '.join(unknown)} (known: {', '.join(sorted(names))})")
        needed = ("name", "pad_id", "bot_id", "eot_id", "eos_id", "before_latents", "after_latents")
        missing = [name for name in needed if name not in values]
        if missing:
            raise UserError(f"protocol: missing fields {', '.join(missing)}")
        return cls(**dict(values))

    def to_json(self) -> str:
        """`to_dict` as JSON text with sorted keys: equal protocols give equal text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Protocol:
        """The protocol that `to_json` wrote."""
        return cls.from_dict(json.loads(text))


def _is_whole(value: object) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


def original(vocabulary: int, eos_id: int, with_eos: bool = False) -> Protocol:
    """Protocol of the published CODI code: pad, bot, eot are the ids V, V+1, V+2 after the base vocabulary of V.

    Args:
        vocabulary: V, rows of the embedding of the base model before CODI added three.
        eos_id: end of text of the base tokenizer.
        with_eos: eos before bot and after eot ("original-eos": trained without the published `remove_eos` switch).
    """
    pad, bot, eot = vocabulary, vocabulary + 1, vocabulary + 2
    eos = (eos_id,) if with_eos else ()
    return Protocol(
        name="original-eos" if with_eos else "original",
        pad_id=pad,
        bot_id=bot,
        eot_id=eot,
        eos_id=eos_id,
        before_latents=(*eos, bot),
        after_latents=(eot, *eos),
        excluded_logits=(eot,),  # the published evaluation takes logits[:, :-1]
        answer_style="the-answer-is",
    )


def answer_only(pad_id: int, bocot_id: int, eocot_id: int, eos_id: int) -> Protocol:
    """Protocol of checkpoints with named thought tokens that answer with the bare number."""
    return Protocol(
        name="answer-only",
        pad_id=pad_id,
        bot_id=bocot_id,
        eot_id=eocot_id,
        eos_id=eos_id,
        before_latents=(eos_id, bocot_id),
        after_latents=(eocot_id,),
        before_direct=(eos_id, eocot_id),
        before_verbal=(eos_id,),
        answer_style="number",
        question_suffix=ANSWER_ONLY_SUFFIX,
    )
