"""What the latent loop needs of a CODI model: a language model, the projection, and the protocol of its tokens.

Knows nothing about files and nothing about the loop, which is in rollout.py; `codi.model.CodiModel` joins the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, get_args

from torch import Tensor, nn

from codi.protocol import Protocol, UserError
from lm.model import LanguageModel
from lm.terms import AnswerMode, ControlText, Mask
from lm.text import EncodedBatch, encode

__all__ = ["Parts", "Projection"]


class Projection(nn.Sequential):
    """prj: Dropout, Linear(d_model, width), GELU, Linear(width, d_model), LayerNorm, under the published key names.

    Args:
        d_model: of the base model.
        width: between the two linear layers; None: no projection at all, z = h (published option `use_prj`).
        dropout: on the input.
        norm: False: without the LayerNorm (published option `prj_no_ln`).
    """

    def __init__(self, d_model: int, width: int | None, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        if width is None:
            return
        self.add_module("0", nn.Dropout(dropout))
        self.add_module("1", nn.Linear(d_model, width))
        self.add_module("2", nn.GELU())
        self.add_module("3", nn.Linear(width, d_model))
        if norm:
            self.add_module("ln", nn.LayerNorm(d_model))


class Parts(LanguageModel):
    """Base model + projection + tokenizer + protocol.

    Attributes:
        base: Hugging Face causal language model; runs never modify it.
        prj: Projection from a last state to the next latent's embedding.
        tokenizer: of the checkpoint or its base.
        protocol: token order and ids.
        name: what was loaded, for tables and file names.
        mask: "carried" (attention mask kept through latents and answer) or "published" (dropped after the prompt).
        attention: "sdpa" or "eager".
        n_latents: latents the checkpoint was trained with, the default of `answer`.
        control_text: what the text of a control token means in a question: "plain" text, or the token ("published").
        notes: what loading left out, ignored or found otherwise than in a plain checkpoint, one line each.
        n_layers, n_heads, n_kv_heads, d_head, d_model, vocab_size: sizes of the base model, vocab with added tokens.
    """

    def __init__(
        self,
        base: Any,
        prj: Projection,
        tokenizer: Any,
        protocol: Protocol,
        *,
        name: str = "codi",
        mask: Mask = "carried",
        n_latents: int = 6,
        checkpoint_hash: Callable[[], str] | str = "",
        control_text: ControlText = "plain",
        notes: Sequence[str] = (),
    ) -> None:
        if mask not in get_args(Mask):
            raise UserError(f"mask must be 'carried' or 'published', got {mask!r}")
        super().__init__(base, tokenizer, name=name)
        self.prj = prj.eval()
        self.protocol = protocol
        self.mask: Mask = mask
        self.n_latents = n_latents
        self._hash = checkpoint_hash
        self.control_text: ControlText = control_text
        self.notes = tuple(notes)
        outside = [i for i in protocol.token_ids if i >= self.vocab_size]
        if outside:
            raise UserError(
                f"protocol {protocol.name!r} uses token {outside[0]}, the vocabulary has ids 0..{self.vocab_size - 1}"
            )

    @property
    def checkpoint_hash(self) -> str:
        """SHA-256 over the checkpoint's weight files; computed when first asked for."""
        if callable(self._hash):
            self._hash = self._hash()
        return self._hash

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The protocol's end of text."""
        return (self.protocol.eos_id,)

    @property
    def pad_id(self) -> int:
        """The protocol's padding."""
        return self.protocol.pad_id

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {type(self.base).__name__}, protocol={self.protocol.name!r}, "
            f"n_layers={self.n_layers}, d_model={self.d_model}, {self.dtype}, {self.device})"
        )

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Text of every special token of the tokenizer, and of the protocol's tokens that it knows, with their ids."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {token.content: i for i, token in added.items() if token.special or i in self.protocol.token_ids}

    def project(self, h: Tensor) -> Tensor:
        """z = prj(h): the embedding of the next latent, (…, d_model); h itself without a projection."""
        if not len(self.prj):
            return h
        return self.prj(h.to(self.prj.get_parameter("1.weight").dtype)).to(h.dtype)

    def encode(self, texts: Sequence[str], thought: AnswerMode = "latent") -> EncodedBatch:
        """Questions as left-padded token ids, the protocol's tokens appended, words never.

        Args:
            texts: questions, used as they are.
            thought: which tokens to append: "latent" (up to the begin-of-thought token), "direct" (no thought) or
                "verbal" (a written chain follows).

        Raises:
            ValueError: no texts, a text that is not a string, one without any token, or one with the text of a control
                token that the tokenizer cannot read as plain text.
        """
        after = self.protocol.before(thought)
        control = {} if self.control_text == "published" else self.control_tokens
        return encode(self.tokenizer, texts, self.pad_id, after, what="question", control=control).to(self.device)
