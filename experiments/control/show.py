"""`codi control show`: norms, cosines between layers and methods, and what vectors say through the unembedding.

The logit lens of a direction is what adding it would do to the logits if nothing came between: unembedding(norm(v)) −
unembedding(norm(0)). Its largest entries are what the vector promotes, its smallest what −v promotes. No items are
asked; one reading of the files takes seconds. Runs as `codi control show`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from experiments.control.figures import cosine_figure, norm_figure
from experiments.control.options import ShowOptions
from experiments.control.vectors import read_vectors, vector_files_hash
from experiments.study.folder import open_run
from experiments.study.options import identity_of
from experiments.study.result import Result, Section
from experiments.study.run import Findings, to_stderr, write_result
from steering.control_vectors import ControlVector

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["main", "run", "tokens_of"]

SHOWN_LAYERS = 6
"""Layers whose tokens are in the summary; the table has them all."""


@torch.no_grad()
def tokens_of(model: LanguageModel, vector: ControlVector, k: int) -> pd.DataFrame:
    """The k tokens that a vector promotes most at every layer, and those that its opposite does.

    Returns:
        layer, sign (1, −1), rank from 1, token_id, token, logit (change of the logit, of a direction of the length that
        the final norm gives it).
    """
    zero = torch.zeros(1, model.d_model, device=model.device, dtype=model.dtype)
    plain = model.unembedding(model.final_norm(zero)).double()
    rows = []
    for layer in vector.layers:
        state = vector[layer].to(model.device, model.dtype)[None]
        change = (model.unembedding(model.final_norm(state)).double() - plain)[0]
        for sign in (1, -1):
            top = (sign * change).topk(min(k, len(change)))
            for rank, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
                text = repr(model.tokenizer.decode([token]))[1:-1]
                rows.append({"layer": layer, "sign": sign, "rank": rank, "token_id": token, "token": text,
                             "logit": sign * value})  # fmt: skip
    return pd.DataFrame(rows)


def run(
    options: ShowOptions, model: LanguageModel | None = None, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Read the vectors and say what they are like.

    Raises:
        ValueError: no vectors, vectors of another model, or a folder that holds another run.
        OSError: the folder cannot be written.
    """
    model = options.load() if model is None else model
    vectors = read_vectors(options.vectors, model)
    identity = {
        "study": options.COMMAND, "format": 1, "options": identity_of(options), "weights_hash": model.weights_hash,
        "vectors": vector_files_hash(options.vectors),
    }  # fmt: skip
    with open_run(options.out, identity, model=options.model, about=", ".join(vectors), say=say) as folder:
        tables = _tables(model, vectors, options.top)
        layers = {name: vector.cosines().numpy() for name, vector in vectors.items()}
        first = next(iter(vectors.values())).layers[0]
        findings = Findings(
            _words(vectors, tables),
            tables,
            lambda: {
                "norms": norm_figure(tables["norms"], explained=True),
                "cosines": cosine_figure(layers, tables["cosines_methods"], first),
            },
            {"norms": "Length of the vectors per layer.", "cosines": "Cosines between layers, and between methods."},
        )
        return write_result(folder, findings, options, "Control vectors, read", model.name)


def main(options: ShowOptions) -> None:
    """Load, run, print the summary."""
    print(run(options, say=to_stderr).markdown())


def _tables(model: LanguageModel, vectors: Mapping[str, ControlVector], k: int) -> dict[str, pd.DataFrame]:
    norms, between, methods = [], [], []
    for name, vector in vectors.items():
        table = vector.cosines().numpy()
        for i, (layer, norm) in enumerate(vector.norms().items()):
            explained = vector.origin.explained.get(layer, np.nan)
            norms.append({"method": name, "layer": layer, "norm": norm, "explained": explained})
            between += [
                {"method": name, "layer": layer, "other": other, "cosine": table[i, j]}
                for j, other in enumerate(vector.layers)
            ]
    for first, second in itertools.combinations(vectors, 2):
        for layer, cosine in vectors[first].cosine(vectors[second]).items():
            methods.append({"first": first, "second": second, "layer": layer, "cosine": cosine})
    return {
        "norms": pd.DataFrame(norms).astype({"explained": float}),
        "cosines_layers": pd.DataFrame(between),
        "cosines_methods": pd.DataFrame(methods, columns=["first", "second", "layer", "cosine"]),
        "tokens": pd.concat(
            [tokens_of(model, vector, k).assign(method=name) for name, vector in vectors.items()], ignore_index=True
        ),
    }


def _words(vectors: Mapping[str, ControlVector], tables: Mapping[str, pd.DataFrame]) -> list[Section]:
    origin = next(iter(vectors.values())).origin
    found = [
        Section(
            f"{len(vectors)} vectors of {origin.model_name or 'an unnamed model'}: {', '.join(vectors)}; layers are "
            "outputs of blocks. Tokens: what adding the vector (+) or its opposite (−) would do to the logits if no "
            "block came after (logit lens)."
        )
    ]
    methods = tables["cosines_methods"]
    if not methods.empty:
        lines: list[str] = []
        for (first, second), own in methods.groupby(["first", "second"], sort=False):
            lowest, highest = own["cosine"].min(), own["cosine"].max()
            lines.append(f"{first} and {second} {lowest:.2f} to {highest:.2f}".replace("-0", "−0"))
        found.append(Section("; ".join(lines) + ".", "Cosines between methods, lowest to highest layer"))
    for name, vector in vectors.items():
        found.append(Section(_tokens(tables["tokens"], name, vector.layers), f"Tokens, {name}"))
    return found


def _tokens(table: pd.DataFrame, method: str, layers: Sequence[int]) -> str:
    own = table[table["method"] == method]
    places = sorted({round(i * (len(layers) - 1) / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)})
    lines = ["The most promoted ones at some layers (tokens.csv has all):\n", "| layer | + | − |", "|---|---|---|"]
    for layer in (layers[place] for place in places):
        here: Any = own[own["layer"] == layer]
        sides = [
            " ".join(f"`{token}`" for token in here[here["sign"] == sign]["token"]).replace("|", "\\|")
            for sign in (1, -1)
        ]
        lines.append(f"| {layer} | {sides[0]} | {sides[1]} |")
    return "\n".join(lines)
