"""`codi lens transfer`: every lens at every position, its own or not, latents ↔ text: KL(model's output ‖ lens).

Trials: `transfer`, one row per lens × prompt × position × layer 0..n_layers − 1, null where a lens does not read a
position; position −1 is a token of the question. The plain lens is always the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from codi import CodiModel
from experiments.lens.options import TransferOptions
from experiments.lens.prompts import batches, clusters_of, per_cent, printed, sizes_of
from experiments.lens.saved import lens_hash, lens_identity, lenses_of, load_lens, load_trained
from experiments.statistics.clusters import Settings, mean_intervals
from experiments.statistics.equivalence import family_level, judge_presence
from experiments.study.claims import ClaimsTable, effect_claim
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lenses.latent_lens import TEXT, LatentLens
from lenses.training import collect_states, divergence_to_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STUDY", "Plan", "main", "run", "transfer_claims", "transfer_readings", "transfer_table"]

TRANSFER = pa.schema(
    {
        "lens": pa.string(),
        "prompt_id": pa.string(),
        "cluster": pa.string(),
        "position": pa.int16(),
        "layer": pa.int16(),
        "divergence": pa.float32(),
        "agreement": pa.float32(),
    }
)
"""divergence: KL to the model's output, nats, mean over the prompt's tokens there; agreement: share of them whose most
probable token is the model's."""


# --- Reading ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transfer_readings(
    model: CodiModel,
    lenses: Sequence[LatentLens],
    problems: Sequence[Problem],
    *,
    text_tokens: int = 8,
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> pd.DataFrame:
    """Every lens at every position of every prompt.

    Args:
        model: the model.
        lenses: the plain one first.
        problems: held out.
        text_tokens: tokens of every question for position TEXT.
        batch_size: prompts at once.
        seed: of the choice of text tokens.
        advance: called with the number of prompts just read.

    Returns:
        The columns of TRANSFER: positions TEXT = −1, 0..n, layers 0..n_layers − 1.
    """
    positions = [TEXT, *range(model.n_latents + 1)]
    shape = (len(lenses), len(problems), len(positions), model.n_layers)
    found, agree = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    generator = torch.Generator().manual_seed(seed)
    for rows in batches(problems, batch_size):
        states = collect_states(model, [problems[i].question for i in rows], positions, text_tokens, generator)
        best = lenses[0].unembed.unembedding(states.hidden[:, -1].float()).argmax(-1)
        for i, lens in enumerate(lenses):
            chosen = states.at([position for position in positions if lens.reads(position)])
            mine = torch.isin(states.position, chosen.position.unique())
            divergence = divergence_to_output(lens, chosen)[:, :-1]
            same = torch.stack(
                [(lens.log_probs(chosen, layer).argmax(-1) == best[mine]).float() for layer in range(model.n_layers)],
                dim=1,
            ).cpu()
            for j, position in enumerate(positions):
                here = (chosen.position == position).cpu()
                if not here.any():
                    continue
                prompt = chosen.prompt.cpu()[here]
                count = torch.bincount(prompt, minlength=len(rows))[:, None]
                for store, values in ((found, divergence), (agree, same)):
                    total = torch.zeros(len(rows), model.n_layers).index_add_(0, prompt, values[here])
                    store[i, rows, j] = (total / count).numpy()
        advance(len(rows))
    lens_axis, prompt_axis, position_axis, layer_axis = (axis.reshape(-1) for axis in np.indices(shape))
    return pd.DataFrame(
        {
            "lens": np.array([lens.name for lens in lenses], dtype=object)[lens_axis],
            "prompt_id": np.array([problem.prompt_id for problem in problems], dtype=object)[prompt_axis],
            "cluster": np.array(clusters_of(problems), dtype=object)[prompt_axis],
            "position": np.array(positions)[position_axis],
            "layer": layer_axis,
            "divergence": found.reshape(-1),
            "agreement": agree.reshape(-1),
        }
    )


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        lenses: names, without the plain one.
        trained: (name, positions) of every lens of the folder.
    """

    lenses: tuple[str, ...]
    folder: str
    trained: tuple[tuple[str, tuple[int, ...]], ...]
    text_tokens: int
    batch_size: int
    seed: int
    settings: Settings


def make_plan(options: TransferOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: no trained lens, or one that is not there or for another model.
    """
    saved = load_trained(options.lens, model)
    names = tuple(name for name in (options.read or tuple(saved)) if name != "plain")
    if not names:
        raise ValueError("transfer needs a trained lens; plain is always beside it")
    load_lens(names, options.lens, model)
    return Plan(
        lenses=names,
        folder=str(options.lens),
        trained=tuple((item.name, item.positions) for item in saved.values()),
        text_tokens=options.text_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        settings=options.statistics(options.seed),
    )


def parts(plan: Plan) -> list[Part]:
    """One trial table of one part."""
    arguments = {
        "lenses": plan.lenses, "folder": plan.folder, "text_tokens": plan.text_tokens, "batch_size": plan.batch_size,
    }  # fmt: skip
    return [Part("transfer", readings, arguments, plan.seed, TRANSFER)]


def readings(
    bench: Workbench, *, lenses: tuple[str, ...], folder: str, text_tokens: int, batch_size: int, seed: int
) -> pd.DataFrame:
    """The table `transfer`."""
    problems = bench.prompts.evaluation
    every = bench.once(lenses_of, ("plain", *lenses), folder)
    with bench.bar(len(problems), "prompt", "reading") as advance:
        return transfer_readings(
            bench.model, every, problems, text_tokens=text_tokens, batch_size=batch_size, seed=seed, advance=advance
        )


# --- Findings ---------------------------------------------------------------------------------------------------------


def transfer_table(trials: pd.DataFrame, settings: Settings | None = None) -> pd.DataFrame:
    """KL of every lens at every position, beside the plain lens.

    Args:
        trials: of `transfer_readings`.
        settings: of the intervals.

    Returns:
        One row per lens × position × layer: divergence with lower and upper, plain (the plain lens there), change
        (divergence − plain, paired) with change_lower and change_upper, agreement, n, n_clusters. layer −1: mean over
        all layers.
    """
    names, positions = list(trials["lens"].unique()), [int(k) for k in trials["position"].unique()]
    n_layers = trials["layer"].nunique()
    n = len(trials) // (len(names) * len(positions) * n_layers)
    shape = (len(names), n, len(positions), n_layers)
    found, agree = (trials[name].to_numpy(float).reshape(shape) for name in ("divergence", "agreement"))
    clusters = trials["cluster"].to_numpy(object).reshape(shape)[0, :, 0, 0]
    before = _with_mean(found[0])
    frames = []
    for i, name in enumerate(names):
        measured, alike = _with_mean(found[i]), _with_mean(agree[i])
        layers = [-1, *range(n_layers)]
        frame = pd.MultiIndex.from_product([positions, layers], names=["position", "layer"]).to_frame(index=False)
        frame.insert(0, "lens", name)
        level = mean_intervals(measured, clusters, settings, bounds=(0.0, np.inf))
        change = mean_intervals(measured - before, clusters, settings, bounds=(-np.inf, np.inf))
        frame["divergence"], frame["lower"], frame["upper"] = level["mean"], level["lower"], level["upper"]
        frame["plain"] = before.mean(axis=0)
        frame["change"] = change["mean"]
        frame["change_lower"], frame["change_upper"] = change["lower"], change["upper"]
        frame["agreement"] = alike.mean(axis=0)
        frame["n"], frame["n_clusters"] = level["n"], level["n_clusters"]
        frames.append(frame[frame["n"] > 0])
    return pd.concat(frames, ignore_index=True)


def _with_mean(values: np.ndarray) -> np.ndarray:
    """(prompt, position, layer) -> (prompt, position × (mean over layers, then every layer))."""
    return np.concatenate([values.mean(-1, keepdims=True), values], axis=-1).reshape(len(values), -1)


def transfer_claims(readings: pd.DataFrame, trained: dict[str, tuple[int, ...]], settings: Settings) -> ClaimsTable:
    """S2 of every lens, one family: a lens fails where it reads worse than the plain lens.

    Args:
        readings: the trial table, of `transfer_readings`.
        trained: positions that each lens was trained on.
        settings: the level at which all claims hold together.
    """
    claims = ClaimsTable()
    number = sum(len(own) > 1 and TEXT not in own for lens, own in trained.items() if lens != "plain")
    if not number:
        return claims
    table = transfer_table(readings, replace(settings, level=family_level(settings.level, number)))
    mean = table[table["layer"] == -1]
    for lens in dict.fromkeys(mean["lens"]):
        own = trained.get(lens, ())
        on_text = mean[(mean["lens"] == lens) & (mean["position"] == TEXT)]
        if lens == "plain" or len(own) < 2 or TEXT in own or on_text.empty:
            continue
        row = on_text.iloc[0]
        by_text = mean[(mean["lens"] == "text") & (mean["position"] == TEXT)]["divergence"]
        note = f"KL on text {row['divergence']:.3f}, plain lens {row['plain']:.3f}"
        note += f", lens trained on text {by_text.iloc[0]:.3f}" if len(by_text) else ""
        bounds = row.drop(["lower", "upper"]).rename({"change_lower": "lower", "change_upper": "upper"})
        claims.add(
            effect_claim(
                f"S2, lens {lens}",
                "a lens trained on latents fails on text tokens",
                "KL to the model's output on text tokens minus that of the plain lens, nats, mean over layers; above 0",
                judge_presence(float(bounds["lower"]), float(bounds["upper"]), above=0.0, family=number),
                bounds,
                note,
                of="change",
                corrected=f"Bonferroni, together at {100 * settings.level:g} %" if number > 1 else "",
            )
        )
    return claims


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Table, figure, claims and words."""
    table = transfer_table(trials["transfer"], plan.settings)
    claims = transfer_claims(trials["transfer"], dict(plan.trained), plan.settings)
    sample = sizes_of(trials["transfer"])
    caption = (
        "KL of each lens to the model's output, nats, mean over layers, at every position, and its change against the "
        "logit lens."
    )
    return Findings(
        [Section(text_of(plan, table, sample), form="plain")],
        {"transfer": table},
        lambda: figures(table, sample),
        {"transfer": caption},
        claims if len(claims) else None,
    )


def text_of(plan: Plan, table: pd.DataFrame, sample: str) -> str:
    """What the command prints."""
    mean, n_layers = table[table["layer"] == -1], int(table["layer"].max()) + 1
    lines = [f"KL to the model's output, nats, mean over layers 0..{n_layers - 1}, {sample}:"]
    for lens in [name for name in dict.fromkeys(table["lens"]) if name != "plain"]:
        own = mean["position"].isin(dict(plan.trained).get(lens, ()))
        for words, chosen in (
            ("where it was trained", own),
            ("other latents", ~own & (mean["position"] > 0)),
            ("text", ~own & (mean["position"] == TEXT)),
        ):
            rows = mean[(mean["lens"] == lens) & chosen]
            if len(rows):
                level, plain = rows["divergence"].mean(), rows["plain"].mean()
                worse, better = int((rows["change_lower"] > 0).sum()), int((rows["change_upper"] < 0).sum())
                lines.append(
                    f"  {lens:<8} {words:<21} {level:7.3f}, logit lens {plain:7.3f}; of {len(rows)} positions "
                    f"better at {better}, worse at {worse} ({per_cent(plan.settings.level)})"
                )
    return "\n".join(lines)


def figures(table: pd.DataFrame, sample: str) -> dict[str, Figure]:
    """The one figure."""
    from experiments.lens.figures import transfer_figure

    return {"transfer": transfer_figure(table, f"{sample}.")}


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=TransferOptions,
    title="Lenses where they were not trained",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=lambda options, model, prompts: lens_identity(options, model, lens=lens_hash(options.lens)),
)

run = STUDY.run


def main(options: TransferOptions) -> None:
    """Load, run, print the summary."""
    print(printed(run_study(STUDY, options, say=to_stderr), "Table and figure: "))
