"""Hand-weighted CODI models of which it is known where the answer comes from, and prompts for them.

    carrier "latents"   latent 2 carries step 1 and latent 4 carries step 2: latents 1 and 3 read them from the prompt,
                        the end-of-thought token reads them from the cache slots of latents 2 and 4 only
    carrier "prompt"    the end-of-thought token reads both from the prompt; latents carry nothing

    storing_model(latents)   three latents hold one of three numbers each, in state and cache slot, whatever they
                        are fed: block 1 of latent k reads it from the prompt, block 2 of the end-of-thought token reads
                        the slots of those latents

The first two answer step1 + step2, "0" where one of the two does not arrive; the third answers the sum of its numbers.
The model is a real GPT-2 (two blocks, of the first two models the second does nothing; one head per number that is
moved) with a real projection, run by the library's own code. Every content is a one-hot of size 1; two ballast
coordinates of ±M make every layer norm the identity but for 1 %.
"""

from __future__ import annotations

import itertools
from typing import Literal

import pandas as pd
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from codi import CodiModel, Projection
from codi.protocol import answer_only
from experiments.tasks.problem import Problem
from experiments.tasks.split import Split

A, B = 4, 12  # values of step 1 are 1..4, of step 2 1..12
D, HEADS, BALLAST = 96, 2, 30.0
PROMPT = 7  # <s> operation scene a b </s> <bot>: the position of latent 1
SHARP = 40.0  # logit of a wanted slot over the others

_SIZES = {"A": A, "B": B, "RA": A, "RB": B, "LA": A, "LB": B, "FA": A, "FB": B, "ANS": A + B + 1}
_SIZES |= dict.fromkeys(("isA", "isB", "isE", "isNum", "isBos", "p1", "p2", "p3", "p4", "up", "down"), 1)
_STARTS = dict(zip(_SIZES, torch.tensor([0, *_SIZES.values()]).cumsum(0)[:-1].tolist(), strict=True))
assert sum(_SIZES.values()) <= D


def at(name: str, i: int = 0) -> int:
    """Coordinate i of a group."""
    assert i < _SIZES[name]
    return _STARTS[name] + i


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "<pad>", "<bot>", "<eot>", "[UNK]", "addition", "subtraction", "t0", "t1"]
    words += [f"a{i + 1}" for i in range(A)] + [f"b{i + 1}" for i in range(B)] + [str(i) for i in range(A + B + 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@torch.no_grad()
def planted_model(carrier: Literal["latents", "prompt"] = "latents", attention: str = "sdpa") -> CodiModel:
    """The model described above."""
    tokenizer = _tokenizer()
    ids = tokenizer.get_vocab()
    config = GPT2Config(
        vocab_size=len(ids),
        n_embd=D,
        n_head=HEADS,
        n_layer=2,
        n_positions=32,
        n_inner=A * B,
        activation_function="relu",
        tie_word_embeddings=False,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=1,
    )
    base = GPT2LMHeadModel(config).eval()
    for parameter in base.parameters():
        parameter.zero_()
    scale = BALLAST / (D / 2) ** 0.5  # a layer norm divides by about D^-1/2 · sqrt(2) · BALLAST
    for norm in [base.transformer.ln_f] + [n for block in base.transformer.h for n in (block.ln_1, block.ln_2)]:
        norm.weight.fill_(scale)

    wte, wpe = base.transformer.wte.weight, base.transformer.wpe.weight
    wte[:, at("up")], wte[:, at("down")] = BALLAST, -BALLAST
    wte[ids["<s>"], at("isBos")] = 1
    wte[ids["<eot>"], at("isE")] = 1
    for i in range(A):
        wte[ids[f"a{i + 1}"], [at("A", i), at("isA")]] = 1
    for i in range(B):
        wte[ids[f"b{i + 1}"], [at("B", i), at("isB")]] = 1
    for i in range(A + B + 1):
        wte[ids[str(i)], at("isNum")] = 1
    for k in (1, 2, 3, 4):
        wpe[PROMPT + k - 1, at(f"p{k}")] = 1

    block = base.transformer.h[0]
    head = D // HEADS
    weight = block.attn.c_attn.weight  # (in, 3 D): queries, keys, values
    sharp = SHARP * head**0.5
    # Per head: who looks (query), at what (key), and which content is moved where.
    wiring = [("p1", "isA", "p2", "A", "LA", "RA", "FA", A), ("p3", "isB", "p4", "B", "LB", "RB", "FB", B)]
    for number, (reader, token, slot, content, carried, read, found, size) in enumerate(wiring):
        q, k, v = number * head, D + number * head, 2 * D + number * head
        final = (token, content) if carrier == "prompt" else (slot, carried)
        if carrier == "latents":
            weight[at(reader), q], weight[at(token), k] = sharp, 1.0
        weight[at("isE"), q + 1], weight[at(final[0]), k + 1] = sharp, 1.0
        block.attn.c_attn.bias[q + 2], weight[at("isBos"), k + 2] = 0.5 * sharp, 1.0  # everybody else: the first token
        for i in range(size):
            if carrier == "latents":
                weight[at(content, i), v + i] = 1.0
                block.attn.c_proj.weight[number * head + i, at(read, i)] = 1.0
            weight[at(final[1], i), v + size + i] = 1.0
            block.attn.c_proj.weight[number * head + size + i, at(found, i)] = 1.0
    for i in range(A):
        for j in range(B):
            unit = i * B + j  # fires where both have arrived
            block.mlp.c_fc.weight[at("FA", i), unit] = block.mlp.c_fc.weight[at("FB", j), unit] = 10.0
            block.mlp.c_fc.bias[unit] = -15.0
            block.mlp.c_proj.weight[unit, at("ANS", i + j + 2)] = 0.2
    head_weight = base.lm_head.weight
    for i in range(A + B + 1):
        head_weight[ids[str(i)], at("ANS", i)] = 20.0
    head_weight[ids["0"], at("isE")] = 6.0
    head_weight[ids["</s>"], at("isNum")] = 20.0

    prj = Projection(D, A + B)
    for parameter in prj.parameters():
        parameter.zero_()
    first, second, norm = prj.get_submodule("1"), prj.get_submodule("3"), prj.get_submodule("ln")
    for content, carried, size, offset in (("RA", "LA", A, 0), ("RB", "LB", B, A)):
        for i in range(size):
            first.weight[offset + i, at(content, i)] = 1.0  # type: ignore[index,operator]
            second.weight[at(carried, i), offset + i] = 1.0  # type: ignore[index,operator]
            second.bias[at(carried, i)] = -10.0  # type: ignore[index,operator]
    first.bias.fill_(10.0)  # type: ignore[operator,union-attr]
    second.bias[at("up")], second.bias[at("down")] = BALLAST, -BALLAST  # type: ignore[index,operator]
    norm.weight.fill_(scale)  # type: ignore[operator,union-attr]

    protocol = answer_only(ids["<pad>"], ids["<bot>"], ids["<eot>"], ids["</s>"])
    return CodiModel(base, prj, tokenizer, protocol, name=f"planted-{carrier}", checkpoint_hash=f"planted-{carrier}")


def planted_problems(repeats: int, first: int = 0) -> list[Problem]:
    """Prompts: step 1 in 1..4, Z in 1..3, step 2 = step1 · Z; two scenes, two operations (subtraction has the next step
    1); `repeats` clusters for every (step 1, Z), numbered from `first`."""
    problems = []
    for rank in range(first, first + repeats):
        for s in range(1, A + 1):
            for z in (1, 2, 3):
                for operation in ("addition", "subtraction"):
                    step1 = s if operation == "addition" else s % A + 1
                    step2 = step1 * z
                    for scene in ("t0", "t1"):
                        problems.append(
                            Problem(
                                prompt_id=f"{rank}-{s}-{z}-{operation}-{scene}",
                                question=f"{operation} {scene} a{step1} b{step2}",
                                answer=step1 + step2,
                                steps=(f"?={step1}", f"{step1}*{z}={step2}", f"{step1}+{step2}={step1 + step2}"),
                                cluster=f"{rank},{s},{z}",
                                template=scene,
                                operation=operation,
                                numbers=(rank, s, z),
                                intermediates=(step1, step2, step1 + step2),
                            )
                        )
    return problems


def repeated(trials: pd.DataFrame, times: int) -> pd.DataFrame:
    """A trial table as if so many times more prompts, in clusters of their own, had given the same answers."""
    return pd.concat(
        [trials.assign(**{name: trials[name] + f"#{i}" for name in ("prompt_id", "cluster")}) for i in range(times)],
        ignore_index=True,
    )


def planted_split(repeats: int = 1) -> Split:
    """Derivation and evaluation prompts that share no cluster."""
    return Split(tuple(planted_problems(repeats, first=100)), tuple(planted_problems(repeats)))


# --- A model that stores at chosen latents ----------------------------------------------------------------------------

V = 3  # values of each of the three numbers: 1..3, 4..6, 7..9
_NAMES = "abc"
_GROUPS = {"A": V, "B": V, "C": V, "RA": V, "RB": V, "RC": V, "FA": V, "FB": V, "FC": V, "ANS": 19}
_GROUPS |= dict.fromkeys(
    ("isA", "isB", "isC", "isE", "isNum", "isBos", *(f"p{k}" for k in range(1, 7)), "up", "down"), 1
)
_FIRST = dict(zip(_GROUPS, torch.tensor([0, *_GROUPS.values()]).cumsum(0)[:-1].tolist(), strict=True))
assert sum(_GROUPS.values()) <= D


def storing_tokenizer() -> PreTrainedTokenizerFast:
    """Words a1..a3, b1..b3, c1..c3, the numbers 0..18, three scenes."""
    words = ["<s>", "</s>", "<pad>", "<bot>", "<eot>", "[UNK]", "add", "t0", "t1", "t2"]
    words += [f"{name}{i + 1}" for name in _NAMES for i in range(V)] + [str(i) for i in range(19)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@torch.no_grad()
def storing_model(latents: tuple[int, int, int] = (2, 4, 6)) -> CodiModel:
    """The model described above: latents[i] holds the i-th number."""
    tokenizer = storing_tokenizer()
    ids = tokenizer.get_vocab()
    config = GPT2Config(
        vocab_size=len(ids), n_embd=D, n_head=3, n_layer=2, n_positions=32, n_inner=V**3, activation_function="relu",
        tie_word_embeddings=False, attn_implementation="eager", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    base = GPT2LMHeadModel(config).eval()
    for parameter in base.parameters():
        parameter.zero_()
    scale = BALLAST / (D / 2) ** 0.5
    for norm in [base.transformer.ln_f] + [n for block in base.transformer.h for n in (block.ln_1, block.ln_2)]:
        norm.weight.fill_(scale)

    def place(name: str, i: int = 0) -> int:
        return _FIRST[name] + i

    wte, wpe, first = base.transformer.wte.weight, base.transformer.wpe.weight, PROMPT + 1  # a number more than above
    wte[:, place("up")], wte[:, place("down")] = BALLAST, -BALLAST
    wte[ids["<s>"], place("isBos")] = wte[ids["<eot>"], place("isE")] = 1
    for name in _NAMES:
        for i in range(V):
            wte[ids[f"{name}{i + 1}"], [place(name.upper(), i), place(f"is{name.upper()}")]] = 1
    for i in range(19):
        wte[ids[str(i)], place("isNum")] = 1
    for k in range(1, 7):
        wpe[first + k - 1, place(f"p{k}")] = 1

    head = D // 3
    sharp = SHARP * head**0.5
    for number, (name, latent) in enumerate(zip("ABC", latents, strict=True)):
        q, k, v = number * head, D + number * head, 2 * D + number * head
        # who looks, at what, which content is moved where: the latent at the prompt, then the end at the latent
        for block, reader, token, content, found in (
            (base.transformer.h[0], f"p{latent}", f"is{name}", name, f"R{name}"),
            (base.transformer.h[1], "isE", f"p{latent}", f"R{name}", f"F{name}"),
        ):
            weight = block.attn.c_attn.weight
            weight[place(reader), q], weight[place(token), k] = sharp, 1.0
            block.attn.c_attn.bias[q + 1], weight[place("isBos"), k + 1] = 0.5 * sharp, 1.0  # everybody else: the first
            for i in range(V):
                weight[place(content, i), v + i] = 1.0
                block.attn.c_proj.weight[number * head + i, place(found, i)] = 1.0
    mlp, output = base.transformer.h[1].mlp, base.lm_head.weight
    for unit in range(V**3):
        digits = unit // V**2, unit // V % V, unit % V
        mlp.c_fc.bias[unit] = 10.0 * digits.count(0) - 35.0  # fires at the end where all three have arrived; the lowest
        mlp.c_fc.weight[place("isE"), unit] = 10.0  # value is also what is taken if none has
        for name, i in zip("ABC", digits, strict=True):
            for other in range(1, V):
                mlp.c_fc.weight[place(f"F{name}", other), unit] = (10.0 if other == i else 0.0) if i else -5.0
        mlp.c_proj.weight[unit, place("ANS", sum(digits) + 12)] = 0.2
    for i in range(19):
        output[ids[str(i)], place("ANS", i)] = 20.0
    for offset, name in ((1, "A"), (4, "B"), (7, "C")):
        for i in range(V):
            output[ids[str(i + offset)], place(f"R{name}", i)] = 12.0 - 4.0 * i  # what a latent holds can be read
    output[ids["0"], place("isE")], output[ids["</s>"], place("isNum")] = 3.0, 20.0

    prj = Projection(D, 4)
    for parameter in prj.parameters():
        parameter.zero_()
    second, norm = prj.get_submodule("3"), prj.get_submodule("ln")
    second.bias[place("up")], second.bias[place("down")] = BALLAST, -BALLAST  # type: ignore[index,operator]
    norm.weight.fill_(scale)  # type: ignore[operator,union-attr]
    protocol = answer_only(ids["<pad>"], ids["<bot>"], ids["<eot>"], ids["</s>"])
    name = f"storing-{''.join(map(str, latents))}"
    return CodiModel(base, prj, tokenizer, protocol, name=name, checkpoint_hash=name)


def storing_split(repeats: int = 3) -> Split:
    """Prompts with all 27 triples of numbers in three scenes each; the two sides share no cluster."""

    def problems(first: int) -> tuple[Problem, ...]:
        return tuple(
            Problem(
                prompt_id=f"{rank}-{i}-{j}-{k}-{scene}",
                question=f"add {scene} a{i} b{j} c{k}",
                answer=i + j + k + 9,
                steps=(f"?={i}", f"?={j + 3}", f"?={k + 6}", f"{i}+{j + 3}+{k + 6}={i + j + k + 9}"),
                cluster=f"{rank},{i},{j},{k}",
                template=scene,
                operation="addition",
                numbers=(100 + rank, 200 + i, 300 + j, 400 + k),
                intermediates=(i, j + 3, k + 6, i + j + k + 9),
            )
            for rank in range(first, first + repeats)
            for i, j, k in itertools.product(range(1, V + 1), repeat=3)
            for scene in ("t0", "t1", "t2")
        )

    return Split(problems(1000), problems(0))
