"""`codi cot show`: what a vector is: norms, cosines, the tokens that it stands for, and texts side by side.

Logit lens of a direction: it is taken through the final norm and the unembedding as if it were a residual stream; the
tokens with the highest logits are those that the direction alone would favour, those of its opposite the ones that it
would push away. Its length is lost in the norm. Early layers are read in the coordinates of the last one, which need
not be theirs.

No trials: files are read anew in seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.cot.measures import CONDITION
from experiments.cot.options import ShowOptions
from experiments.cot.tables import label, records
from experiments.cot.vectors import Vectors, folder_hash
from experiments.figures.heatmap import Scale, draw_matrix
from experiments.figures.series import baseline
from experiments.figures.style import BASELINE, CONTROLS, CORRELATION, legend, look, new_figure
from experiments.study.folder import open_run
from experiments.study.result import Result, Section
from experiments.study.run import Findings, to_stderr, write_result
from lm.errors import UserError
from lm.model import LanguageModel
from lm.text import to_text
from steering.control_vectors import ControlVector

__all__ = ["main", "readings", "run"]


@torch.no_grad()
def readings(model: LanguageModel, vector: ControlVector, top: int) -> pd.DataFrame:
    """The tokens that a vector and its opposite stand for, by the logit lens.

    Returns:
        Rows layer, side ("+" or "−"), rank (from 1), token_id, token, logit.
    """
    rows = []
    for layer in vector.layers:
        direction = vector[layer].to(model.device, model.dtype)
        for side, sign in (("+", 1.0), ("−", -1.0)):
            logits = model.logits(model.final_norm(sign * direction)).float()
            best = logits.topk(min(top, len(logits)))
            for rank, (value, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
                rows.append({"layer": layer, "side": side, "rank": rank, "token_id": token,
                             "token": _token(model, token), "logit": value})  # fmt: skip
    return pd.DataFrame(rows)


def _token(model: LanguageModel, token: int) -> str:
    """A token as it is printed: blanks as ·, line ends as ⏎."""
    try:
        text = to_text(model.tokenizer, [token])
    except UserError:
        text = ""
    return text.replace(" ", "·").replace("\n", "⏎") or f"<{token}>"


def run(
    options: ShowOptions, model: LanguageModel | None = None, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Read the vectors of a folder and write what they are.

    Args:
        options: of the command.
        model: loaded as they say; None: it is loaded.
        say: called with lines for a person.

    Raises:
        ValueError: no vector there, one of another model, or a folder that holds another run.
    """
    model = options.load() if model is None else model
    vectors = Vectors.read(options.vectors, model)
    texts = _texts(options.texts)
    identity = {
        "study": options.COMMAND,
        "vectors": folder_hash(options.vectors),
        "weights_hash": model.weights_hash,
        "top": options.top,
        "samples": options.samples,
        "texts": "" if texts is None else hashlib.sha256(texts.to_json().encode()).hexdigest(),
    }
    with open_run(options.out, identity, model=options.model, say=say) as folder:
        findings = _findings(options, model, vectors, texts)
        return write_result(folder, findings, options, "Chain-of-thought vector, looked at", model.name)


def _findings(options: ShowOptions, model: LanguageModel, vectors: Vectors, texts: pd.DataFrame | None) -> Findings:
    whole = vectors.whole
    read = readings(model, whole, options.top)
    rows = []
    for name, vector in _named(vectors).items():
        norms, cosines = vector.norms(), vector.cosine(whole)
        rows += [{"vector": name, "layer": k, "norm": norms[k], "cosine": cosines[k]} for k in vector.layers]
    tables = {"readings": read, "vectors": pd.DataFrame(rows)}
    sections = [Section(_about(whole)), Section(_read_lines(read, whole), "Logit lens"),
                Section(_cosine_lines(tables["vectors"]), "Cosines")]  # fmt: skip
    if texts is not None:
        tables["texts"] = texts
        sections += _text_sections(texts, options.samples)
    caption = (
        "Norm by layer; cosine of the vectors without one family of sets, and of the shuffled ones, with the whole; "
        "cosines between its layers."
    )
    return Findings(sections, tables, lambda: {"vector": _figure(tables["vectors"], whole)}, {"vector": caption})


def _named(vectors: Vectors) -> dict[str, ControlVector]:
    found = {"all": vectors.whole}
    found |= {f"without {family}": vector for family, vector in vectors.without.items()}
    return found | {f"shuffled {draw + 1}": vector for draw, vector in enumerate(vectors.shuffled)}


def _about(vector: ControlVector) -> str:
    origin = vector.origin
    return (
        f"{origin.method} vector of {origin.model_name}, from {origin.n} questions, tokens read: {origin.tokens}; "
        f"layers {vector.layers[0]}..{vector.layers[-1]}, width {vector.d_model}; made by {origin.made_by}."
    )


def _read_lines(read: pd.DataFrame, vector: ControlVector) -> str:
    """Tokens at some layers, as a table."""
    shown = sorted({*np.linspace(vector.layers[0], vector.layers[-1], 6).round().astype(int).tolist()})
    lines = ["Tokens that the direction alone favours (+), and that its opposite does (−).", ""]
    lines += ["| layer | + | − |", "|---|---|---|"]
    for layer in shown:
        cells = [" ".join(f"`{token}`" for token in read[(read["layer"] == layer) & (read["side"] == side)]["token"])
                 for side in ("+", "−")]  # fmt: skip
        lines.append(f"| {layer} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _cosine_lines(table: pd.DataFrame) -> str:
    means = table[table["vector"] != "all"].groupby("vector", sort=False)["cosine"].mean()
    if means.empty:
        return "There is only the one vector."
    return "With the whole vector, mean over layers: " + "; ".join(f"{k} {v:.2f}" for k, v in means.items()) + "."


def _texts(folder: Path) -> pd.DataFrame | None:
    """Unsteered and steered texts that `codi cot eval` wrote, side by side: a row per question, a column per condition.
    None: there are none."""
    from experiments.study.folder import RunFolder

    if not (folder / "trials").is_dir():
        return None
    trials = RunFolder(folder).trials()
    own = trials[(trials["draw"] == -1) & trials["vector"].isin(["", "all"]) & ~(
        (trials["prompt"] == "steps") & (trials["way"] != ""))]  # fmt: skip
    order = {"neutral": 0, "direct": 1, "steps": 2}
    own = own.assign(place=own["prompt"].map(order).astype(int), way=own["way"].astype(str))
    own = own.sort_values(["prompt_id", "way", "place", "coefficient"], ascending=[True, True, True, False])
    own = own.assign(condition=[label(row) for row in records(own[list(CONDITION)])])
    return own[["prompt_id", "answer", "condition", "text"]].reset_index(drop=True)


def _text_sections(texts: pd.DataFrame, samples: int) -> list[Section]:
    """The first questions with their texts."""
    sections = []
    for name in texts["prompt_id"].unique()[:samples]:
        own = texts[texts["prompt_id"] == name]
        lines = [f"- **{row.condition}**: {' ⏎ '.join(row.text.strip().splitlines())[:300] or '(nothing)'}"
                 for row in own.itertuples()]  # fmt: skip
        sections.append(Section(f"Right answer: {own['answer'].iloc[0]}.\n\n" + "\n".join(lines), f"Texts ({name})"))
    return sections


def _figure(table: pd.DataFrame, whole: ControlVector) -> Any:
    figure, axes = new_figure(1, 3, height=2.6)
    left, middle, right = axes[0]
    own = table[table["vector"] == "all"]
    left.plot(own["layer"], own["norm"], color=BASELINE, linewidth=1.4)
    left.set(xlabel="layer", ylabel="norm", title="Length of the vector", yscale="log")
    baseline(middle, 0.0)
    for place, name in enumerate(one for one in table["vector"].unique() if one != "all"):
        rows = table[table["vector"] == name]
        style: Mapping[str, Any] = {"color": CONTROLS[place % 3]} if "shuffled" in name else look(place)
        middle.plot(rows["layer"], rows["cosine"], label=name, linewidth=0.9, markersize=2.2, **style)
    middle.set(xlabel="layer", ylabel="cosine with the whole", title="Others", ylim=(-1.03, 1.03))
    legend(figure, (middle,))
    names = [str(layer) for layer in whole.layers]
    draw_matrix(right, whole.cosines().numpy(), names, names, "Cosine between layers", upwards=True,
                scale=Scale(-1, 1, CORRELATION), form=".1f")  # fmt: skip
    right.set(xlabel="layer", ylabel="layer")
    return figure


def main(options: ShowOptions) -> None:
    """Load, look, print."""
    print(run(options, say=to_stderr).markdown())
