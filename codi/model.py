"""A loaded CODI model: base language model, projection, tokenizer and protocol, and what can be asked of them.

Built by `codi.load_codi`; knows nothing about files. The latent loop is in rollout.py, answers in decode.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codi import decode
from codi import rollout as latent
from codi.protocol import Protocol, Thought, UserError
from codi.rollout import KEEP, EncodedBatch, Intervention, LatentRollout, Prefill

__all__ = ["CodiModel", "Projection"]

Mode = Literal["latent", "direct", "verbal"]


class Projection(nn.Sequential):
    """prj: Dropout, Linear(d_model, width), GELU, Linear(width, d_model), LayerNorm, under the published key names."""

    def __init__(self, d_model: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.add_module("0", nn.Dropout(dropout))
        self.add_module("1", nn.Linear(d_model, width))
        self.add_module("2", nn.GELU())
        self.add_module("3", nn.Linear(width, d_model))
        self.add_module("ln", nn.LayerNorm(d_model))


class CodiModel:
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
        mask: Literal["carried", "published"] = "carried",
        n_latents: int = 6,
        checkpoint_hash: Callable[[], str] | str = "",
    ) -> None:
        if mask not in ("carried", "published"):
            raise UserError(f"mask must be 'carried' or 'published', got {mask!r}")
        self.base = base.eval()
        self.prj = prj.eval()
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.name = name
        self.mask = mask
        self.n_latents = n_latents
        self._hash = checkpoint_hash

        config = base.config
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.max_positions: int = config.max_position_embeddings
        self.decoder: nn.Module = base.base_model
        blocks = getattr(self.decoder, "layers", None)
        self.layers: Sequence[nn.Module] = self.decoder.h if blocks is None else blocks
        assert len(self.layers) == self.n_layers, (
            f"{len(self.layers)} blocks found, the configuration has {self.n_layers}"
        )
        embedding = base.get_input_embeddings()
        self.vocab_size: int = embedding.weight.shape[0]
        outside = [i for i in protocol.token_ids if i >= self.vocab_size]
        if outside:
            raise UserError(
                f"protocol {protocol.name!r} uses token {outside[0]}, the vocabulary has ids 0..{self.vocab_size - 1}"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.base.get_input_embeddings().weight.dtype

    @property
    def attention(self) -> str:
        """Attention implementation of the base model: "sdpa" or "eager"."""
        return str(self.base.config._attn_implementation)

    @property
    def checkpoint_hash(self) -> str:
        """SHA-256 over the checkpoint's weight files; computed when first asked for."""
        if callable(self._hash):
            self._hash = self._hash()
        return self._hash

    def __repr__(self) -> str:
        return (
            f"CodiModel({self.name!r}, {type(self.base).__name__}, protocol={self.protocol.name!r}, "
            f"n_layers={self.n_layers}, d_model={self.d_model}, {self.dtype}, {self.device})"
        )

    # --- Pieces ---

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings (…, d_model) of token ids, without positions."""
        return self.base.get_input_embeddings()(input_ids)

    def project(self, h: Tensor) -> Tensor:
        """z = prj(h): the embedding of the next latent, (…, d_model)."""
        return self.prj(h.to(self.prj.get_parameter("1.weight").dtype)).to(h.dtype)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (…, vocab) of last states h (already normed), nothing excluded."""
        return self.base.get_output_embeddings()(h)

    def check_length(self, positions: int) -> None:
        """Raise ValueError if the base model has fewer positions than this."""
        if positions > self.max_positions:
            raise UserError(
                f"{positions} positions are needed, but {self.name} has {self.max_positions}: shorten the text"
            )

    # --- What can be asked ---

    def encode(self, texts: Sequence[str], thought: Thought = "latent") -> EncodedBatch:
        """Questions as left-padded token ids, the protocol's tokens appended, words never.

        Args:
            texts: questions, used as they are.
            thought: which tokens to append: "latent" (up to the begin-of-thought token), "direct" (no thought) or
                "verbal" (a written chain follows).

        Raises:
            ValueError: no texts, a text that is not a string, or one without any token.
        """
        if isinstance(texts, str):
            raise UserError("encode takes a list of questions, got one string: put it in a list")
        if not texts:
            raise UserError("encode needs at least one question, got none")
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"a question must be a string, got {type(text).__name__}")
        after = list(self.protocol.before(thought))
        rows = [list(ids) + after for ids in self.tokenizer(list(texts))["input_ids"]]
        if any(len(row) == 0 for row in rows):
            raise UserError("a question must have at least one token, got an empty one")
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), self.protocol.pad_id, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = True
        return EncodedBatch(input_ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def prefill(
        self,
        batch: EncodedBatch,
        interventions: Sequence[Intervention] = (),
        keep: Collection[str] = ("hidden_states",),
    ) -> Prefill:
        """Compute the prompts once. See `codi.rollout.prefill`."""
        return latent.prefill(self, batch, interventions, keep)

    @torch.no_grad()
    def rollout(
        self,
        source: EncodedBatch | Prefill | LatentRollout,
        n_latents: int = 6,
        interventions: Sequence[Intervention] = (),
        keep: Collection[str] = KEEP,
    ) -> LatentRollout:
        """Feed latents 1..n_latents, everything they compute in the open. See `codi.rollout.rollout`."""
        return latent.rollout(self, source, n_latents, interventions, keep)

    def answer(
        self,
        texts: Sequence[str],
        n_latents: int | None = None,
        mode: Mode = "latent",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        batch_size: int = 64,
        interventions: Sequence[Intervention] = (),
    ) -> list[str]:
        """Answer questions, in the order given. See `codi.decode.answer`."""
        return decode.answer(
            self,
            texts,
            n_latents=self.n_latents if n_latents is None else n_latents,
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            interventions=interventions,
        )
