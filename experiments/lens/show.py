"""`codi lens show`: the most probable tokens of one prompt at every position and layer, as a table and as a heatmap.

The prompt is any text, or the first problem of a task. No trials: one prompt is read anew in a second.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from codi import CodiModel
from codi.decode import decode_answers
from experiments.lens.options import ShowOptions
from experiments.lens.prompts import printed
from experiments.lens.saved import lens_hash, lens_identity, load_lens
from experiments.study.folder import open_run
from experiments.study.result import Result, Section
from experiments.study.run import Findings, to_stderr, write_result
from experiments.study.spellings import token_text
from lenses.latent_lens import LatentLens, latent_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main", "read_prompt", "run"]


@torch.no_grad()
def read_prompt(model: CodiModel, lenses: Sequence[LatentLens], question: str, k: int = 5) -> tuple[pd.DataFrame, str]:
    """The k most probable tokens at every position and layer of one question.

    Returns:
        Rows lens, latent (0: begin of thought), layer, rank, token_id, token, probability, entropy (nats); and the
        model's answer.
    """
    run = model.rollout(model.encode([question]), model.n_latents, keep=("hidden_states", "cache"))
    rows = []
    for lens in lenses:
        for position in range(model.n_latents + 1):
            if not lens.reads(position):
                continue
            states = latent_states(run, [position])
            for layer in range(model.n_layers + 1):
                log_p = lens.log_probs(states, layer)[0]
                top = log_p.topk(min(k, len(log_p)))
                entropy = float(-(log_p.exp() * log_p).sum())
                for rank, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
                    rows.append(
                        {
                            "lens": lens.name,
                            "latent": position,
                            "layer": layer,
                            "rank": rank,
                            "token_id": token,
                            "token": token_text(model, token),
                            "probability": float(np.exp(value)),
                            "entropy": entropy,
                        }
                    )
    return pd.DataFrame(rows), decode_answers(model, run).texts[0]


def run(options: ShowOptions, model: CodiModel, say: Callable[[str], None] = lambda line: None) -> Result:
    """Read one prompt and write its folder.

    Args:
        options: of the command.
        model: loaded as they say.
        say: called with lines for a person.

    Raises:
        ValueError: lenses that are not there, no such problem, or a folder that holds another run.
    """
    text = options.text
    if text is None:
        text = options.load_problems(options.seed).evaluation[0].question
    suffix = model.protocol.question_suffix if options.suffix else ""
    question = text if not suffix or text.rstrip().endswith(suffix.strip()) else text + suffix
    lenses = load_lens(options.read, options.lens, model)
    marked = "" if set(options.read) == {"plain"} else lens_hash(options.lens)
    out = options.out or _own_folder([question, options.read, marked, model.checkpoint_hash])
    with open_run(out, lens_identity(options, model, lens=marked), model=options.model, say=say) as folder:
        readings, answer = read_prompt(model, lenses, question, options.top)
        folder.write_json("prompt.json", {"question": question, "answer": answer})
        findings = Findings(
            [Section(text_of(readings, question, answer), form="plain")],
            {"readings": readings},
            lambda: figures(readings, text, answer),
            {"heatmap": "Most probable token and its probability at every position and layer of one prompt."},
        )
        return write_result(folder, findings, options, "One prompt through the lenses", model.name)


def _own_folder(content: list[object]) -> Path:
    """A folder for this prompt, these lenses and this model."""
    mark = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    return Path(f"runs/lens-show-{mark}")


def text_of(readings: pd.DataFrame, question: str, answer: str) -> str:
    """What the command prints."""
    from experiments.lens.figures import label

    lines = [question, f"answer: {_one_line(answer)}", ""]
    for lens in readings["lens"].unique():
        mine = readings[(readings["lens"] == lens) & (readings["rank"] == 1)]
        tokens = mine.pivot(index="layer", columns="latent", values="token").iloc[::-1]
        chances = mine.pivot(index="layer", columns="latent", values="probability").iloc[::-1]
        lines.append(f"{lens}: most probable token (probability); columns: 0 = begin of thought, then latents")
        lines.append("layer " + "".join(f"{position:^16}" for position in tokens.columns))
        for layer in tokens.index:
            cells = (f"{label(token)} {p:.2f}" for token, p in zip(tokens.loc[layer], chances.loc[layer], strict=True))
            lines.append(f"{layer:>5} " + "".join(f"{cell:^16}" for cell in cells))
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Text of an answer without line ends and control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown or "(none)"


def figures(readings: pd.DataFrame, text: str, answer: str) -> dict[str, Figure]:
    """The one figure."""
    from experiments.lens.figures import heatmap_figure

    title = f"{_wrapped(text, 122)}\n{_wrapped(f'answer: {_one_line(answer)}', 100)}"
    return {"heatmap": heatmap_figure(readings, title)}


def _wrapped(text: str, width: int) -> str:
    lines = textwrap.wrap(text, width)
    return "\n".join(lines if len(lines) <= 4 else [*lines[:3], lines[3] + " …"])


def main(options: ShowOptions) -> None:
    """Load, read, print the summary."""
    print(printed(run(options, options.load(), to_stderr), "\nwritten to "))
