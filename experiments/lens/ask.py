"""`codi ask "question"`: the model's answer to one question, and what a lens reads at each latent before it.

    codi ask "There are 7 birds in the garden. Then 5 more arrive. How many birds are there now?"
    codi ask "…" --lens runs/lens --layers 2 3 --direct --chain

The logit lens, or a tuned lens that is given. At the last layer every lens is the model's own distribution over the
next token. Nothing is written; `codi lens show` keeps the same reading at all layers, with a figure, in a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from codi import CodiModel
from experiments.lens.options import AskOptions
from experiments.lens.saved import load_lens
from experiments.lens.show import read_prompt

__all__ = ["asked", "main"]


def main(options: AskOptions) -> None:
    """Load, ask, print."""
    print(asked(options, options.load()))


def asked(options: AskOptions, model: CodiModel) -> str:
    """What the command prints.

    Args:
        options: of the command.
        model: loaded as they say.

    Raises:
        ValueError: a layer or a lens that is not there, or a question that the model cannot take.
    """
    layers = options.layers or (model.n_layers - 1, model.n_layers)
    wrong = [layer for layer in layers if layer > model.n_layers]
    if wrong:
        raise ValueError(f"layers must be in 0..{model.n_layers}, got {wrong[0]}")
    suffix = model.protocol.question_suffix if options.suffix else ""
    text = options.question
    question = text if not suffix or text.rstrip().endswith(suffix.strip()) else text + suffix
    named = ("plain",) if options.lens is None else (options.read,)
    (lens,) = load_lens(named, options.lens or Path(), model)  # the folder of the logit lens is never looked at
    readings, answer = read_prompt(model, [lens], question, options.top)
    lines = [f"question  {_one_line(question)}", f"answer    {_one_line(answer)}   after {model.n_latents} latents"]
    if options.direct:
        lines.append(f"direct    {_one_line(model.answer([question], mode='direct')[0])}   without a thought")
    if options.chain:
        lines.append(f"chain     {_one_line(model.answer([question], mode='verbal')[0])}   after a written chain")
    return "\n".join([*lines, *_read(readings, layers, model, "logit lens" if lens.is_plain else f"lens {lens.name}")])


def _read(readings: pd.DataFrame, layers: Sequence[int], model: CodiModel, lens: str) -> list[str]:
    """A table per layer: at every position the most probable tokens with their probabilities."""
    lines = []
    for layer in layers:
        own = layer == model.n_layers
        where = f"layer {layer}, the model's own next token" if own else f"layer {layer}, {lens}"
        lines += ["", f"{where}: most probable tokens (probability)"]
        here = readings[readings["layer"] == layer]
        for position, rows in here.groupby("latent", sort=True):
            cells = [f"{token!r} {p:.2f}" for token, p in zip(rows["token"], rows["probability"], strict=True)]
            name = "begin of thought" if position == 0 else f"latent {position}"
            lines.append(f"  {name:<16}  " + "  ".join(f"{cell:<14}" for cell in cells).rstrip())
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
