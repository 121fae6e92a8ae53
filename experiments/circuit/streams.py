"""Trials of `codi circuit` that read residual streams: probes of pairs of words, and priors by the logit lens.

Knows nothing about what is concluded.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from circuits.mixing import Pairs, mixing_scores, pair_states
from circuits.rift import pretraining_prior, rift
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from experiments.tasks.alignment import encode
from experiments.tasks.ontology_pairs import MixingText
from experiments.tasks.ontology_text import OntologyItem
from lm.text import left_padded

__all__ = ["MIXING", "RIFT", "mixing", "priors"]

MIXING = pa.schema(
    {
        "layer": pa.int16(), "probe": TEXT, "labels": TEXT, "text": pa.int32(), "pair": pa.int32(),
        "correct": pa.bool_(), "f1": pa.float64(), "chance": pa.float64(),
    }.items()
)  # fmt: skip
"""One row per layer, probe ("linear", "mlp"), labels ("true", "shuffled") and pair of a test text; f1: macro average of
that probe over all pairs."""
RIFT = pa.schema(
    {
        "item": pa.int32(), "position": pa.int32(), "part": TEXT, "kind": TEXT, "layer": pa.int16(),
        "pretraining": pa.float64(), "context": pa.float64(),
    }.items()
)  # fmt: skip
"""One row per item, position where both priors exist and share no token, and layer: their probabilities. part:
"question" or "chain"; kind: of the subtask whose word is predicted there, else "other"."""


def mixing(bench: Workbench, *, seed: int, layers: tuple[int, ...]) -> pd.DataFrame:
    """Rows of `MIXING`."""
    learn, trial = bench.prompts.mixing
    train, _ = _pairs(bench, learn, layers)
    test, texts = _pairs(bench, trial, layers)
    with bench.bar(len(layers) * 4, "probe", "probes of pairs") as moved:
        found = mixing_scores(train, test, seed=seed, advance=moved)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "layer": layers[one.layer], "probe": one.probe, "labels": one.labels, "text": texts,
                    "pair": np.arange(len(texts)), "correct": one.correct, "f1": one.f1, "chance": one.chance,
                }
            )
            for one in found
        ],
        ignore_index=True,
    )  # fmt: skip


def _pairs(bench: Workbench, texts: tuple[MixingText, ...], layers: tuple[int, ...]) -> tuple[Pairs, list[int]]:
    """Pairs with their streams at the last tokens of both words, and the text of each."""
    model = bench.model
    encoded = [encode(model.tokenizer, text.text, special_tokens=True) for text in texts]
    batch = left_padded([one.ids for one in encoded], model.pad_id)
    width = batch.input_ids.shape[1]
    text, first, second, relation, words = [], [], [], [], set()
    for i, (one, tokens) in enumerate(zip(texts, encoded, strict=True)):
        shift = width - len(tokens)
        for pair in one.pairs:
            text.append(i)
            first.append(shift + tokens.last(pair.first_span))
            second.append(shift + tokens.last(pair.second_span))
            relation.append(pair.relation)
            words |= {pair.first.text, pair.second.text}
    states = pair_states(model, batch, text, first, second, layers)
    return Pairs(states, tuple(relation), frozenset(words)), text


def priors(bench: Workbench, *, seed: int, items: tuple[int, ...]) -> pd.DataFrame:
    """Rows of `RIFT` of some items, at the tokens of question and chain."""
    model = bench.model
    bos = getattr(model.tokenizer, "bos_token_id", None)
    tables = []
    for number in items:
        item: OntologyItem = bench.prompts.items[number]
        text = encode(model.tokenizer, item.text, special_tokens=True)
        question = item.text.rfind("### Input:", 0, item.prompt_end)
        kinds = {text.predicted(cut.span)[0]: cut.kind for cut in item.cuts}
        last = max(kinds)
        chosen = torch.tensor([[i > 0 and text.spans[i][0] >= question for i in range(last + 1)]])
        ids = text.ids[: last + 1]
        before = (ids[0],) if ids[0] == bos else ()
        prior = pretraining_prior(model, [i for i, good in zip(ids, chosen[0].tolist(), strict=True) if good], before)
        found = rift(model, left_padded([ids], model.pad_id), prior, chosen)
        positions, layers = found.pretraining.shape
        place = found.position.numpy()
        parts = ["question" if text.spans[p][0] < item.prompt_end else "chain" for p in place]
        tables.append(
            pd.DataFrame(
                {
                    "item": number,
                    "position": place.repeat(layers),
                    "part": np.array(parts, dtype=object).repeat(layers),
                    "kind": np.array([kinds.get(int(p), "other") for p in place], dtype=object).repeat(layers),
                    "layer": np.tile(np.arange(layers), positions),
                    "pretraining": found.pretraining.flatten().numpy(),
                    "context": found.context.flatten().numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
