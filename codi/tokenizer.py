"""A small byte-level BPE tokenizer with Llama-3's digit rule, in Hugging Face format.

Any text can be encoded (256 byte tokens); a run of up to three digits is one token, longer runs split in groups of
three from the left as Llama 3's do; frequent words of the given sentences are one token. Used to train a model from
scratch; published checkpoints bring their own tokenizers.

Knows nothing about models or tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["BASE_SPECIAL_TOKENS", "CODI_SPECIAL_TOKENS", "build_tokenizer"]

#: Llama 3's pre-tokenizer pattern (its published tokenizer.json)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BASE_SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
CODI_SPECIAL_TOKENS = ("[PAD]", "<|bocot|>", "<|eocot|>")


def build_tokenizer(sentences: Iterable[str], n_words: int = 400) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a base model (without the CODI tokens, which a checkpoint adds after the base vocabulary).

    Args:
        sentences: texts whose words become tokens; digits in them are ignored.
        n_words: most merges learnt from the sentences.

    Returns:
        A fast tokenizer: bytes, numbers "0".."999" (and zero-padded forms), learnt words, then BASE_SPECIAL_TOKENS; it
        puts <|begin_of_text|> first, as Llama 3's does; eos is <|eot_id|>.

    Source: the digit rule is that of Llama 3 (Grattafiori et al. 2024, arXiv 2407.21783).
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = split
    letters_only = ("".join(c for c in sentence if not c.isdigit()) for sentence in sentences)
    words.train_from_iterator(
        letters_only,
        trainers.BpeTrainer(
            vocab_size=256 + n_words, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    learnt = json.loads(words.to_str())["model"]
    digits = "0123456789"
    merges = [[a, b] for a in digits for b in digits]
    merges += [[a + b, c] for a in digits for b in digits for c in digits]
    merges += [[a, b + c] for a in digits for b in digits for c in digits]  # where b + c was merged first
    merges += [pair if isinstance(pair, list) else pair.split(" ") for pair in learnt["merges"]]
    vocabulary = list(sorted(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary += [a + b for a, b in merges]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[(a, b) for a, b in merges]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(BASE_SPECIAL_TOKENS))
    bos = BASE_SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=BASE_SPECIAL_TOKENS[2], clean_up_tokenization_spaces=False
    )
