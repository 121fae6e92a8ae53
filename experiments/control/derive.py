"""`codi control derive`: make control vectors and write them as files, with what is to be known about them.

    vectors/METHOD.safetensors   every layer, exactly, with where it comes from
    vectors/METHOD.gguf          the same for llama.cpp
    norms.csv                    length per layer, what the principal component explains, and how alike the vectors of
                                 two halves of the pairs are (cosine)

Runs as `codi control derive`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.control.figures import norm_figure
from experiments.control.options import DeriveOptions
from experiments.control.plan import making_of
from experiments.control.summary import NEGATIVES
from experiments.control.vectors import Made, halves, make_vectors
from experiments.study.folder import RunFolder, open_run
from experiments.study.result import Result, Section
from experiments.study.run import Findings, language_identity, to_stderr, write_result
from steering.control_vectors import ControlVector
from steering.vector_files import save_vector

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["main", "run"]


def run(
    options: DeriveOptions, model: LanguageModel | None = None, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Make the vectors, write them, and say what they are like.

    Raises:
        ValueError: too few items or pairs, or a folder that holds another run.
        OSError: the folder cannot be written.
    """
    model = options.load() if model is None else model
    items = dataclasses.replace(options, validation=1, limit=1).load_items(options.seed, model.tokenizer)
    making = making_of(options, options.seed, options.batch_size)
    identity = language_identity(options, model, items)
    with open_run(options.out, identity, model=options.model, about=items.about(), say=say) as folder:
        made = make_vectors(model, items.derivation, making)
        table = _table(made, halves(model, items.derivation, making) if made.n_pairs >= 4 else None)
        for method, vector in made.vectors.items():
            _save(folder, method, vector, options.llama_cpp)
        findings = Findings(
            _words(options, made, table),
            {"norms": table},
            lambda: {"norms": norm_figure(table, explained=True)},
            {"norms": "Length of the vectors per layer, and what principal components explain."},
        )
        return write_result(folder, findings, options, "Control vectors, made", model.name)


def main(options: DeriveOptions) -> None:
    """Load, run, print the summary."""
    print(run(options, say=to_stderr).markdown())


def _save(folder: RunFolder, method: str, vector: ControlVector, llama_cpp: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        for ending in (".safetensors", *((".gguf",) if llama_cpp else ())):
            path = Path(place) / f"{method}{ending}"
            save_vector(path, vector)
            folder.write(f"vectors/{path.name}", path.read_bytes())


def _table(made: Made, parts: tuple[Made, Made] | None) -> pd.DataFrame:
    rows = []
    for method, vector in made.vectors.items():
        alike = {} if parts is None else parts[0].vectors[method].cosine(parts[1].vectors[method])
        for layer, norm in vector.norms().items():
            explained = vector.origin.explained.get(layer)
            rows.append({"method": method, "layer": layer, "norm": norm, "explained": explained,
                         "halves": alike.get(layer), "n_pairs": made.n_pairs})  # fmt: skip
    return pd.DataFrame(rows).astype({"explained": float, "halves": float})


def _words(options: DeriveOptions, made: Made, table: pd.DataFrame) -> list[Section]:
    against = NEGATIVES[options.negatives]
    lines = ["Length, and how alike the vectors are that every other pair and the pairs between give:\n",
             "| method | norm, first to last layer | cosine of two halves of the pairs, lowest to highest |",
             "|---|---|---|"]  # fmt: skip
    for method, own in table.groupby("method", sort=False):
        ends = f"{own['norm'].iloc[0]:.2f} to {own['norm'].iloc[-1]:.2f}"
        alike = "–" if own["halves"].isna().all() else f"{own['halves'].min():.2f} to {own['halves'].max():.2f}"
        lines.append(f"| {method} | {ends} | {alike.replace('-', '−')} |")
    last = ", .gguf for llama.cpp" if options.llama_cpp else ""
    return [
        Section(
            f"{made.n_pairs} pairs of {options.task} (a question with its right answer, against: {against}), read at "
            "the last token, at the output of every block; not normalised."
        ),
        Section("\n".join(lines), "Vectors"),
        Section(f"vectors/METHOD.safetensors{last}: {', '.join(made.vectors)}.", "Files"),
    ]
