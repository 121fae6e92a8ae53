"""An auxiliary decoder for training: a small transformer that reads one latent and writes the text of one step.

    latent z_k · tokens of step k, such as "<<7+5=12>>"    ->    cross-entropy of these tokens

Its gradient reaches the latents, so each of them must hold what its step says. Embeddings and unembedding are those of
the base model, which stay as they are. It is used while a model is trained and belongs to no checkpoint (`load_codi`
leaves out the one that published checkpoints of this family carry).

Knows nothing about where latents come from.

Source: Wei et al. 2025, SIM-CoT, arXiv 2509.20317 (section 3): there the decoder is a whole copy of the base model;
here it is a few blocks, a choice of this project's that makes it cheap beside a small base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from codi.parts import Parts
from lm.errors import UserError

__all__ = ["StepDecoder"]

MOST_POSITIONS = 256
"""Longest step in tokens, the latent before it included."""


class StepDecoder(nn.Module):
    """A few new blocks on the embeddings of a base model.

    Args:
        model: for its width, embeddings and unembedding.
        n_layers: blocks, 1 or more.
    """

    def __init__(self, model: Parts, n_layers: int = 2) -> None:
        super().__init__()
        if n_layers < 1:
            raise UserError(f"the decoder needs at least 1 block, got {n_layers}")
        d = model.d_model
        heads = next(h for h in range(max(1, d // 64), 0, -1) if d % h == 0)
        blocks = LlamaModel(
            LlamaConfig(  # type: ignore[call-arg]  # attn_implementation is taken by the parent class
                vocab_size=1,
                hidden_size=d,
                intermediate_size=4 * d,
                num_hidden_layers=n_layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=MOST_POSITIONS,
                attn_implementation="eager",
            )
        )
        del blocks.embed_tokens  # those of the base model are used
        self.blocks = blocks

    def forward(self, model: Parts, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """() mean over latents of the mean cross-entropy (nats) per token of the step that each is to write.

        Args:
            model: that the decoder was made for.
            latents: (row, d_model) as they are fed.
            ids: (row, position) tokens of the step, right padded.
            mask: (row, position) which of them are real, at least one in each row.
        """
        # No token looks ahead, so padding on the right is never seen by one that counts.
        inputs = torch.cat((latents[:, None], model.embed(ids[:, :-1]).to(latents.dtype)), dim=1)
        states = self.blocks(inputs_embeds=inputs, use_cache=False).last_hidden_state
        losses = F.cross_entropy(model.logits(states[mask]).float(), ids[mask], reduction="none")
        lengths = mask.sum(1)
        return (losses / lengths.repeat_interleave(lengths)).sum() / len(latents)
