"""A causal language model of Hugging Face, taken apart: blocks, final norm and unembedding, found by structure.

The blocks are the list of as many modules as the configuration has layers; the final norm is the one module behind
them whose weights are as wide as the residual stream. Where that finds none or several, their names can be given. The
model's own code is never changed: lm/forward.py runs it, lm/generate.py writes with it.

Knows nothing about files, prompts or what is done with states::

    model = LanguageModel(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    model.logits(model.final_norm(x))                   # what the residual stream x after any block says
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lm.chat import as_text, default_form
from lm.errors import UserError
from lm.terms import TextForm
from lm.text import EncodedBatch, encode

__all__ = ["LanguageModel"]


def _find_blocks(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    depth = min((depth for depth, _ in lists), default=0)
    outermost = [module for at, module in lists if at == depth]
    if len(outermost) != 1:
        raise UserError(
            f"{len(outermost)} lists of {n_layers} blocks found in {type(decoder).__name__}, expected one: "
            "give blocks= its name, such as 'model.layers'"
        )
    return outermost[0]


def _find_norm(decoder: nn.Module, blocks: nn.ModuleList, d_model: int) -> nn.Module:
    holder = next((m for m in decoder.modules() if any(child is blocks for child in m.children())), decoder)
    children = list(holder.children())
    place = next((i for i, child in enumerate(children) if child is blocks), 0)

    def norms_among(modules: list[nn.Module]) -> list[nn.Module]:
        return [
            module
            for module in modules
            if not list(module.children())
            and list(module.parameters())
            and all(weight.shape == (d_model,) for weight in module.parameters())
        ]

    # A norm of the embeddings stands before the blocks; a few models (OPT) list their final norm there too.
    norms = norms_among(children[place:]) or norms_among(children[:place])
    if len(norms) != 1:
        found = f"{len(norms)} candidates" if norms else "no final norm"
        raise UserError(
            f"{found} found in {type(holder).__name__}, expected one norm of width {d_model} beside the blocks: "
            "give norm= its name, such as 'model.norm'"
        )
    return norms[0]


class LanguageModel:
    """Base model and tokenizer, with the parts that instruments need.

    Args:
        base: Hugging Face causal language model; runs never modify it.
        tokenizer: of the model; None: texts cannot be encoded.
        name: for tables and messages; None: where the model came from.
        blocks, norm: names in `base` of the list of blocks and of the final norm; None: found by structure.
        form: how a request becomes a text (`lm.chat`); None: the tokenizer's chat template where it has one.
        weights_hash: of the files that the weights were read from, or a function that gives it; "": not known.

    Attributes:
        base, tokenizer, name: as given.
        form: how `text_of` makes a text.
        decoder: the base model without its unembedding.
        blocks: its blocks, 1..n_layers in the numbering of layers.
        n_layers, n_heads, n_kv_heads, d_head, d_model, vocab_size: sizes.
        max_positions: positions that the model has; None: no limit.

    Raises:
        ValueError: blocks that cannot be told apart, or a name that the model does not have.
    """

    def __init__(
        self,
        base: Any,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        blocks: str | None = None,
        norm: str | None = None,
        form: TextForm | None = None,
        weights_hash: Callable[[], str] | str = "",
    ) -> None:
        self.base = base.eval()
        self.tokenizer = tokenizer
        self.form: TextForm = default_form(tokenizer) if form is None else form
        self._weights_hash = weights_hash
        config = base.config.get_text_config()
        self.name = (config.name_or_path or type(base).__name__) if name is None else name
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size: int = base.get_input_embeddings().weight.shape[0]
        self.decoder: nn.Module = base.base_model
        found = _find_blocks(self.decoder, self.n_layers) if blocks is None else self._part("blocks", blocks)
        assert isinstance(found, nn.ModuleList), f"blocks must be a list of modules, {blocks!r} is none"
        self.blocks: nn.ModuleList = found
        self._norm = None if norm is None else self._part("norm", norm)
        self._times = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)

    def _part(self, what: str, name: str) -> nn.Module:
        try:
            return self.base.get_submodule(name)
        except AttributeError:
            raise UserError(f"{what}={name!r}: {type(self.base).__name__} has no part of that name") from None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {type(self.base).__name__}, n_layers={self.n_layers}, "
            f"d_model={self.d_model}, {self.dtype}, {self.device})"
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
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the unembedding.

        Raises:
            ValueError: no such module, or several, behind the blocks.
        """
        return _find_norm(self.decoder, self.blocks, self.d_model) if self._norm is None else self._norm

    @cached_property
    def block_outputs(self) -> int:
        """What a block gives back: 0 a tensor, else a tuple of so many things, the residual stream first. Found by
        running one token when first asked for."""
        seen: list[int] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(0 if isinstance(output, Tensor) else len(output))

        handle = self.blocks[0].register_forward_hook(see)
        try:
            with torch.no_grad():
                self.decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    @property
    def unembedding(self) -> nn.Module:
        """From last states (after the final norm) to logits, before any scaling or capping of these."""
        return self.base.get_output_embeddings()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end a text, as the model's files say.

        Raises:
            ValueError: they name none.
        """
        sources = (getattr(self.base, "generation_config", None), self.base.config.get_text_config(), self.tokenizer)
        for source in sources:
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return (ids,) if isinstance(ids, int) else tuple(ids)
        raise UserError(f"neither {self.name} nor its tokenizer names a token that ends a text")

    @property
    def pad_id(self) -> int:
        """What stands at padding. It is never seen, so any id will do where the tokenizer has none."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None or pad >= self.vocab_size else int(pad)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings (…, d_model) of token ids, without positions."""
        return self.base.get_input_embeddings()(input_ids)

    def logits(self, h: Tensor) -> Tensor:
        """Logits (…, vocab) of last states h (already normed), nothing excluded."""
        logits = self.base.get_output_embeddings()(h)
        if self._times != 1.0:
            logits = logits * self._times
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    @property
    def weights_hash(self) -> str:
        """Identity of the weights: SHA-256 of their files, or the hub's commit; computed when first asked for."""
        if callable(self._weights_hash):
            self._weights_hash = self._weights_hash()
        return self._weights_hash

    def text_of(self, request: str) -> str:
        """The text that the model is given for a request, in the model's form. See `lm.chat`."""
        return as_text(self.tokenizer, request, self.form)

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """Texts (of `text_of`, or that begin with one) as left-padded token ids, on the model's device.

        The tokenizer adds its own special tokens, but in the form "chat", where the text has them. See
        `lm.text.encode`.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.name} was given no tokenizer: texts cannot be encoded")
        return encode(self.tokenizer, texts, self.pad_id, special=self.form != "chat").to(self.device)

    def check_length(self, positions: int) -> None:
        """Raise ValueError if the base model has fewer positions than this."""
        if self.max_positions is not None and positions > self.max_positions:
            raise UserError(
                f"{positions} positions are needed, but {self.name} has {self.max_positions}: shorten the text"
            )
