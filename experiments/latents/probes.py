"""`codi probes`: what a linear map can read from each latent, in each space and layer, on numbers it has not seen.

For every space (h: residual stream, z: the fed embedding, keys, values), latent and layer a linear classifier is fitted
to each target (operation, operands, step1, step2, …, answer) and scored on held-out number triples: accuracy, accuracy
with shuffled labels, selectivity (their difference), what is reachable at all, and r2 of numbers; how, and from whom,
is said in experiments/statistics/probes.py. (A published probe took its labels for "intermediate or final" from the
lens it was meant to confirm and let prompts with the same numbers into both parts; here nothing but the problem gives a
label.)

Knows nothing about lenses, answers or interventions. Runs as `codi probes` or `python -m experiments.latents.probes`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from experiments.statistics.probes import CONTRAST, Design, probe, probe_table
from experiments.study.targets import targets_of
from experiments.tasks import Problem, load_task, with_suffix

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["SPACES", "Config", "collect", "main", "summary"]

Space = Literal["h", "z", "keys", "values"]
SPACES: tuple[Space, ...] = ("h", "z", "keys", "values")


@dataclass(frozen=True)
class Config:
    """Linear probes of latents: operation, operands, steps and answer, by space, latent and layer."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id."""
    task: str = "templates"
    """Problems whose steps are known: templates, arithmetic, a file, a folder or a hub id."""
    split: str = "all"
    """Split of the task; all: every number triple of templates (the probes make their own held-out parts)."""
    limit: int | None = 1344
    """Number of problems, a seeded choice; None: all."""
    min_steps: int | None = None
    """Only problems of at least this many steps (not for templates); None: no bound."""
    max_steps: int | None = None
    """Only problems of at most this many steps (not for templates); None: no bound."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if any."""
    spaces: tuple[Space, ...] = SPACES
    """What is read: h (residual stream, all layers), z (embedding fed), keys (rotation undone), values (per block)."""
    layers: tuple[int, ...] | None = None
    """Layers of h (0..n_layers) and blocks of keys and values (1..n_layers); None: all."""
    folds: int = 5
    """Parts of the cross-validation; all prompts of a number triple are in one part."""
    shuffles: int = 4
    """Label shuffles behind the baseline."""
    resamples: int = 2000
    """Bootstrap resamples of triples behind every interval."""
    batch_size: int = 128
    """Problems computed at once."""
    seed: int = 0
    """Of problems, folds, shuffles and bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs (the probes run on the CPU); auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published setting."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    out: Path = Path("runs/probes")
    """Folder for probes.csv, probes.json, manifest.json and the figure (PNG and PDF)."""


# --- States of a model ------------------------------------------------------------------------------------------------


def collect(
    model: CodiModel,
    problems: Sequence[Problem],
    spaces: Sequence[Space] = SPACES,
    layers: Sequence[int] | None = None,
    batch_size: int = 128,
    advance: Callable[[int], object] = lambda prompts: None,
) -> dict[tuple[str, int, int], np.ndarray]:
    """States of every prompt, one array per place.

    Args:
        model: the model.
        problems: at least one.
        spaces: any of h, z, keys, values.
        layers: of h (0..n_layers) and blocks of keys and values (1..n_layers); None: all. z has layer 0.
        batch_size: prompts at once.
        advance: called with the number of prompts just done.

    Returns:
        (space, latent, layer) -> (prompt, feature) float32, in order. h also has latent 0, the begin-of-thought token.
        Keys have their rotation undone (a probe must not read the length of the prompt from it).

    Raises:
        ValueError: an unknown space, a layer outside 0..n_layers.
    """
    from steering.means import content_keys

    unknown = sorted(set(spaces) - set(SPACES))
    if unknown or not spaces:
        raise ValueError(f"spaces may be {', '.join(SPACES)}, got {', '.join(unknown) or 'none'}")
    wanted = tuple(range(model.n_layers + 1)) if layers is None else tuple(sorted(set(layers)))
    wrong = [layer for layer in wanted if not 0 <= layer <= model.n_layers]
    if wrong:
        raise ValueError(f"layers must be in 0..{model.n_layers}, got {wrong[0]}")
    kept = {"h": "hidden_states", "z": "embeddings", "keys": "keys", "values": "values"}
    found: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for start in range(0, len(problems), batch_size):
        questions = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(questions), model.n_latents, keep=[kept[space] for space in spaces])
        for space in dict.fromkeys(spaces):
            if space == "h":
                assert run.hidden_states is not None and run.bot_hidden_states is not None
                states = {0: run.bot_hidden_states}
                states |= {k + 1: run.hidden_states[:, k] for k in range(run.n_latents)}
                cells = {(k, layer): state[:, layer] for k, state in states.items() for layer in wanted}
            elif space == "z":
                assert run.embeddings is not None
                cells = {(k + 1, 0): run.embeddings[:, k] for k in range(run.n_latents)}
            else:
                slots = content_keys(run, model) if space == "keys" else run.values
                assert slots is not None
                blocks = [layer for layer in wanted if layer > 0]
                cells = {(k + 1, b): slots[:, k, b - 1].flatten(1) for k in range(run.n_latents) for b in blocks}
            for (latent, layer), tensor in cells.items():
                found.setdefault((space, latent, layer), []).append(tensor.float().cpu().numpy())
        advance(len(questions))
    return {place: np.concatenate(parts) for place, parts in found.items()}


# --- Command ----------------------------------------------------------------------------------------------------------


def summary(table: pd.DataFrame) -> str:
    """The best place of every target, and its readability from h_k by latent, as markdown."""
    lines = ["| target | classes | shuffled | reachable | best place | accuracy | selectivity [95 %] | r2 |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for target, cells in table[table["target"] != CONTRAST].groupby("target", sort=False):
        cells = cells.sort_values("selectivity", ascending=False, na_position="last")
        best = cells.iloc[0]
        place = f"{best['space']}, latent {best['latent']}, layer {best['layer']}"
        r2 = "–" if np.isnan(best["r2"]) else f"{best['r2']:.2f}"
        interval = f"{best['selectivity']:.2f} [{best['selectivity_lower']:.2f}, {best['selectivity_upper']:.2f}]"
        lines.append(
            f"| {target} | {best['classes']} | {best['shuffled']:.2f} | {best['reachable']:.2f} | {place} | "
            f"{best['accuracy']:.2f} | {interval} | {r2} |"
        )
    last = table[(table["space"] == "h") & (table["layer"] == table.loc[table["space"] == "h", "layer"].max())]
    if len(last):
        grid = last.pivot(index="target", columns="latent", values="selectivity")
        grid = grid.loc[list(dict.fromkeys(last["target"]))]
        lines += ["", "Selectivity (and r2 of numbers) from h_k, the last layer, by latent (0: begin of thought):", ""]
        lines += ["| target | " + " | ".join(map(str, grid.columns)) + " |", "|---|" + "---|" * grid.shape[1]]
        for name, row in zip(grid.index, grid.to_numpy(), strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
        numbers = last.dropna(subset="r2").pivot(index="target", columns="latent", values="r2")
        for name in [target for target in grid.index if target in numbers.index]:
            lines.append(f"| {name}, r2 | " + " | ".join(f"{value:.2f}" for value in numbers.loc[name]) + " |")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Roll out, probe every place, write table and figure, print the summary."""
    from tqdm import tqdm

    from codi import load_codi
    from experiments.figures.style import FORMATS, encode
    from experiments.latents.probes_figures import draw
    from experiments.study.folder import versions
    from experiments.tasks.split import digest

    if config.resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {config.resamples}")
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}")
    config.out.mkdir(parents=True, exist_ok=True)
    problems = load_task(config.task, config.split, config.limit, config.seed, "", config.min_steps, config.max_steps)
    if any(len(problem.intermediates) < 1 for problem in problems):
        raise ValueError(f"{config.task}: probes need problems whose steps are known")
    model = load_codi(
        config.model, base=config.base, protocol=config.protocol, lora_alpha=config.lora_alpha, mask=config.mask,
        dtype=config.dtype, device=None if config.device == "auto" else config.device,
    )  # fmt: skip
    if config.suffix:
        problems = with_suffix(problems, model.protocol.question_suffix)
    clusters = [problem.cluster or problem.prompt_id for problem in problems]
    design = Design.of(targets_of(problems), clusters, config.folds, config.shuffles, config.seed)
    with tqdm(total=len(problems), unit="prompt", desc="latents") as bar:
        states = collect(model, problems, config.spaces, config.layers, config.batch_size, bar.update)
    scores = [probe(x, design) for x in tqdm(states.values(), unit="place", desc="probes")]
    table = probe_table(list(states), scores, design, resamples=config.resamples, seed=config.seed)

    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    manifest = {
        "options": options, "checkpoint_hash": model.checkpoint_hash, "protocol": model.protocol.to_dict(),
        "problems": digest(problems), "versions": versions(),
    }  # fmt: skip
    (config.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    table.to_csv(config.out / "probes.csv", index=False)
    (config.out / "probes.json").write_text(table.to_json(orient="records", indent=1) + "\n", encoding="utf-8")
    figure = draw(table)
    for form in FORMATS:
        (config.out / f"probes.{form}").write_bytes(encode(figure, form))
    text = (
        f"{model.name}: {config.task}, split {config.split}, {len(problems)} prompts in {len(set(clusters))} number "
        f"triples; linear probes, {config.folds} folds by triple, {config.shuffles} label shuffles\n\n{summary(table)}"
    )
    (config.out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nWritten to {config.out}: probes.csv, probes.json, probes.png, probes.pdf, summary.md")


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
