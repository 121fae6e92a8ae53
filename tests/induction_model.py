"""A two-block GPT-2 whose weights were set by hand: one head copies the token before, another one turns
"A B … A" into B.

Streams have four places, tokens (who stands here), positions, previous token and output, each number twice with
opposite signs so that layer norms have nothing to centre. Block 1, head 2 attends to the position before and writes its
token into the third place; block 2, head 1 looks for a position whose previous token is the current one and writes that
position's token into the output. All other heads are weak noise, MLPs are nothing.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from circuits.patching import Probe
from lm.model import LanguageModel

TOKENS, POSITIONS, HEADS = 16, 32, 4
PLACES = {"token": (0, TOKENS), "position": (TOKENS, POSITIONS), "previous": (48, TOKENS), "out": (64, TOKENS)}
HALF = 80
COPY, INDUCE = (1, 2), (2, 1)
"""The two heads, (block, head)."""


def make_induction_model(noise: float = 0.01) -> LanguageModel:
    """The model; attention is eager, so that patterns can be read."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS, n_embd=2 * HALF, n_layer=2, n_head=HEADS, n_positions=POSITIONS, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    base = GPT2LMHeadModel(config).eval()
    d_head = 2 * HALF // HEADS
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if ".attn.c_attn.weight" in name or ".attn.c_proj.weight" in name:
                weight.copy_(noise * torch.randn_like(weight))
            elif "ln_" not in name:
                weight.zero_()
        base.transformer.wte.weight.copy_(_writes("token"))
        base.transformer.wpe.weight.copy_(_writes("position"))
        base.lm_head.weight.copy_(3 * _writes("out"))
        _set_head(base, COPY, d_head, "position", _shifted(_reads("position")), "token", "previous", 3.0)
        _set_head(base, INDUCE, d_head, "token", _reads("previous"), "token", "out", 3.0)
    return LanguageModel(base, name="induction")


def _reads(place: str) -> Tensor:
    """(d_model, numbers) that takes a place out of a stream."""
    start, size = PLACES[place]
    found = torch.zeros(2 * HALF, size)
    for i in range(size):
        found[start + i, i] = 1
    return found


def _writes(place: str) -> Tensor:
    """(numbers, d_model) that puts a place into a stream, with its negative twin."""
    first = _reads(place).T[:, :HALF]
    return torch.cat((first, -first), dim=1)


def _shifted(read: Tensor) -> Tensor:
    """Position j says j + 1, so that it is found by the position after it."""
    return torch.cat((torch.zeros(len(read), 1), read[:, :-1]), dim=1)


def _set_head(
    base: Any, which: tuple[int, int], d_head: int, query: str, key: Tensor, value: str, out: str, loud: float
) -> None:
    block, head = which
    attention = base.transformer.h[block - 1].attn
    d = 2 * HALF
    for part, read in enumerate((loud * _reads(query), loud * key, _reads(value))):
        columns = slice(part * d + head * d_head, part * d + (head + 1) * d_head)
        attention.c_attn.weight[:, columns] = 0
        attention.c_attn.weight[:, part * d + head * d_head : part * d + head * d_head + read.shape[1]] = read
    rows = slice(head * d_head, (head + 1) * d_head)
    attention.c_proj.weight[rows] = 0
    attention.c_proj.weight[head * d_head : head * d_head + TOKENS] = _writes(out)


def make_texts(n: int, seed: int = 0, length: int = 12) -> list[tuple[list[int], int, int]]:
    """(ids, place of the first A, B): texts "… A B … A", no other token twice."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        ids = rng.sample(range(TOKENS), length - 1)
        place = rng.randrange(1, length - 4)
        found.append(([*ids, ids[place]], place, ids[place + 1]))
    return found


def make_induction_probes(n: int = 8, seed: int = 0) -> list[Probe]:
    """Corrupted: the first A is another token, so that nothing is to be completed."""
    rng = random.Random(seed)
    probes = []
    for ids, place, answer in make_texts(n, seed):
        new = rng.choice([token for token in range(TOKENS) if token not in ids])
        corrupted = [*ids[:place], new, *ids[place + 1 :]]
        other = rng.choice([token for token in ids if token not in (answer, ids[place])])
        probes.append(Probe(tuple(ids), tuple(corrupted), answer, other))
    return probes
