"""`codi lens causal`: ablate what the lens reads, inside the model, beside directions that it does not read.

At each latent × layer, directions of four kinds: "lens" (causal basis of the lens on the derivation prompts), "random"
(isotropic), "covariance" (drawn from the states' covariance, so that their ablation moves the states about as far as a
typical direction in which they vary), "component" (principal components). Each is mean-ablated alone on the evaluation
prompts and the run goes on.

Trials: `effects`, a part per latent: one row per latent × layer × kind × direction × evaluation prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from scipy.stats import spearmanr
from torch import Tensor

from codi import CodiModel, LatentRollout
from codi.decode import decode_answers
from experiments.lens.options import CausalOptions
from experiments.lens.prompts import clusters_of, per_cent, printed, sizes, span
from experiments.lens.saved import lens_hash, lens_identity, lenses_of, load_lens
from experiments.statistics.clusters import Settings, mean_intervals
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lenses.causal import AblateDirections, causal_basis, energies
from lenses.latent_lens import LatentLens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STUDY", "Plan", "main", "points_of", "run", "summary_of"]

EFFECTS = pa.schema(
    {
        "latent": pa.int16(),
        "layer": pa.int16(),
        "kind": pa.string(),
        "direction": pa.int16(),
        "prompt_id": pa.string(),
        "cluster": pa.string(),
        "energy": pa.float64(),
        "moved": pa.float32(),
        "output": pa.float32(),
        "answer": pa.float32(),
        "flipped": pa.bool_(),
    }
)
"""energy: of the lens, nats, derivation prompts; moved: squared distance by which the ablation moves this prompt's
state; output: KL of the model's own output distribution at that latent; answer: KL of its distribution of the first
answer token; flipped: whether the most probable first answer token changed."""


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved; derivation and evaluation are in words."""

    lens: str
    folder: str
    latents: tuple[int, ...]
    layers: tuple[int, ...]
    directions: int
    batch_size: int
    seed: int
    settings: Settings
    derivation: str
    evaluation: str


def make_plan(options: CausalOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: latents or layers that the model does not have, or a lens that is not there.
    """
    latents = options.latents or tuple(range(1, model.n_latents + 1))
    layers = options.layers or tuple(range(model.n_layers))
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong:
        raise ValueError(
            f"layers must be in 0..{model.n_layers - 1} (at the last one every lens is exact), got {wrong[0]}"
        )
    wrong = [k for k in latents if not 1 <= k <= model.n_latents]
    if wrong:
        raise ValueError(f"latents must be in 1..{model.n_latents}, got {wrong[0]}")
    lens = load_lens(options.read, options.lens, model)[0]
    unread = [k for k in latents if not lens.reads(k)]
    if unread:
        raise ValueError(f"lens {lens.name!r} does not read latent {unread[0]}: choose --latents or train it")
    return Plan(
        lens=lens.name,
        folder=str(options.lens),
        latents=latents,
        layers=layers,
        directions=options.directions,
        batch_size=options.batch_size,
        seed=options.seed,
        settings=options.statistics(options.seed),
        derivation=_sizes(prompts.derivation),
        evaluation=_sizes(prompts.evaluation),
    )


def _sizes(problems: Sequence[Problem]) -> str:
    return sizes(len(problems), len(set(clusters_of(problems))))


def parts(plan: Plan) -> list[Part]:
    """One trial table, a part per latent."""
    shared = {
        "lens": plan.lens, "folder": plan.folder, "layers": plan.layers, "directions": plan.directions,
        "batch_size": plan.batch_size,
    }  # fmt: skip
    return [
        Part(
            f"effects-{k}",
            effects,
            # controls of all cells are drawn one after another: a part passes over the draws of those before it
            {"latent": k, "cells_before": place * len(plan.layers), **shared},
            plan.seed,
            EFFECTS,
            "effects",
        )
        for place, k in enumerate(plan.latents)
    ]


def effects(
    bench: Workbench,
    *,
    latent: int,
    cells_before: int,
    lens: str,
    folder: str,
    layers: tuple[int, ...],
    directions: int,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """What ablating each direction does, at one latent and every layer."""
    states, fed = bench.once(derivation_states, batch_size)
    reader = bench.once(lenses_of, (lens,), folder)[0]
    baseline = bench.once(unedited)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(cells_before):
        _random(states.shape[-1], len(states), directions, generator)
    frames = []
    with bench.bar(len(layers), "layer", f"ablating at latent {latent}") as advance:
        for layer in layers:
            x = states[:, latent - 1, layer].to(bench.model.device)
            mean = x.mean(dim=0) if layer else fed[latent - 1].to(x.device)  # layer 0: z itself, before any position
            cell = _Cell(bench.model, baseline, bench.prompts.evaluation, latent, layer, mean)
            chosen = _directions(reader, x, layer, latent, directions, generator)
            frames.append(cell.effects(chosen, energies(reader, x, layer, latent, chosen.vectors).tolist(), batch_size))
            advance(1)
    return pd.concat(frames, ignore_index=True)


# --- Directions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def derivation_states(bench: Workbench, batch_size: int) -> tuple[Tensor, Tensor]:
    """(prompt, latent, layer, d_model) states of the derivation prompts on the CPU, and the mean of z (latent,
    d_model)."""
    model, problems = bench.model, bench.prompts.derivation
    states, fed = [], []
    for start in range(0, len(problems), batch_size):
        questions = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(questions), model.n_latents, keep=("embeddings", "hidden_states"))
        assert run.hidden_states is not None and run.embeddings is not None
        states.append(run.hidden_states.float().cpu())
        fed.append(run.embeddings.float().cpu())
    return torch.cat(states), torch.cat(fed).mean(dim=0)


@dataclass(frozen=True)
class _Directions:
    """Unit vectors (direction, d_model), the kind of each and its number among its kind, from 1."""

    vectors: Tensor
    kind: list[str]
    number: list[int]


def _random(width: int, n_states: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Isotropic draws (direction, width), and mixtures (direction, state)."""
    isotropic = torch.randn(n, width, generator=generator)
    return isotropic, torch.randn(n, n_states, generator=generator)


def _directions(
    lens: LatentLens, x: Tensor, layer: int, latent: int, n: int, generator: torch.Generator
) -> _Directions:
    """Directions of all kinds, n of each, from states x (prompt, d_model)."""
    away = x - x.mean(dim=0)
    isotropic, mixture = _random(x.shape[1], len(x), n, generator)
    isotropic, covariance = isotropic.to(x.device), mixture.to(x.device) @ away
    kinds = {
        "lens": causal_basis(lens, x, layer, latent, n).directions,
        "random": isotropic / isotropic.norm(dim=1, keepdim=True),
        "covariance": covariance / covariance.norm(dim=1, keepdim=True).clamp(min=1e-12),
        "component": torch.linalg.svd(away, full_matrices=False).Vh[:n],
    }
    return _Directions(
        torch.cat(list(kinds.values())),
        [name for name, rows in kinds.items() for _ in range(len(rows))],
        [i + 1 for rows in kinds.values() for i in range(len(rows))],
    )


# --- Effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Baseline:
    """The evaluation prompts unedited: their rollout, and the log-probabilities of the first answer token."""

    run: LatentRollout
    answer: Tensor


@torch.no_grad()
def unedited(bench: Workbench) -> _Baseline:
    """What edited runs are compared with."""
    model = bench.model
    batch = model.encode([problem.question for problem in bench.prompts.evaluation])
    run = model.rollout(batch, model.n_latents, keep=("embeddings", "hidden_states", "cache"))
    return _Baseline(run, _first_token(model, run))


def _first_token(model: CodiModel, run: LatentRollout) -> Tensor:
    """(row, vocab) log-probabilities of the first answer token."""
    found = decode_answers(model, run, max_new_tokens=1, keep_first_logits=True).first_logits
    assert found is not None
    return found.float().log_softmax(-1)


@dataclass(frozen=True)
class _Cell:
    """One latent and layer at which directions are ablated.

    Attributes:
        mean: (d_model,) state that an ablated direction is set to.
    """

    model: CodiModel
    baseline: _Baseline
    problems: Sequence[Problem]
    latent: int
    layer: int
    mean: Tensor

    @torch.no_grad()
    def effects(self, chosen: _Directions, energy: list[float], batch_size: int) -> pd.DataFrame:
        """Effects of all directions, as many at once as fit into a batch of rows."""
        n, k = len(self.problems), self.latent
        output = self.model.logits(self.baseline.run.states[:, k]).float().log_softmax(-1)
        start = self.baseline.run.truncate(k - 1)
        at_once = max(1, batch_size // n)
        frames = []
        for begin in range(0, len(chosen.vectors), at_once):
            here = slice(begin, begin + at_once)
            measured = self._ablate(chosen.vectors[here], start, output)
            frames.append(
                pd.DataFrame(
                    {
                        "latent": k,
                        "layer": self.layer,
                        "kind": np.repeat(chosen.kind[here], n),
                        "direction": np.repeat(chosen.number[here], n),
                        "prompt_id": [p.prompt_id for p in self.problems] * len(chosen.kind[here]),
                        "cluster": clusters_of(self.problems) * len(chosen.kind[here]),
                        "energy": np.repeat(energy[here], n),
                        **measured,
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def _ablate(self, vectors: Tensor, start: LatentRollout, output: Tensor) -> dict[str, np.ndarray]:
        """Ablate each of some directions on every prompt and go on to the answer."""
        run, answer, k = self.baseline.run, self.baseline.answer, self.latent
        assert run.hidden_states is not None and run.embeddings is not None
        seen = (run.hidden_states[:, k - 1, self.layer] if self.layer else run.embeddings[:, k - 1]).float()
        rows = torch.arange(len(self.problems), device=self.model.device).repeat(len(vectors))
        each = vectors.repeat_interleave(len(self.problems), dim=0)
        edit = AblateDirections(k, self.layer, each, self.mean)
        edited = self.model.rollout(start.select(rows), self.model.n_latents, [edit], keep=("cache",))
        after = _first_token(self.model, edited)
        own = self.model.logits(edited.states[:, k]).float().log_softmax(-1)
        return {
            "moved": (((seen[rows] - self.mean) * each).sum(-1) ** 2).cpu().numpy(),
            "output": _divergence(output[rows], own),
            "answer": _divergence(answer[rows], after),
            "flipped": (answer[rows].argmax(-1) != after.argmax(-1)).cpu().numpy(),
        }


def _divergence(log_p: Tensor, log_q: Tensor) -> np.ndarray:
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu().numpy()


# --- Findings ---------------------------------------------------------------------------------------------------------


def points_of(trials: pd.DataFrame) -> pd.DataFrame:
    """One row per direction: energy, and means of moved, output, answer and flipped over prompts."""
    return trials.groupby(["latent", "layer", "kind", "direction"], as_index=False).agg(
        energy=("energy", "first"),
        moved=("moved", "mean"),
        output=("output", "mean"),
        answer=("answer", "mean"),
        flipped=("flipped", "mean"),
    )


def summary_of(trials: pd.DataFrame, settings: Settings | None = None) -> pd.DataFrame:
    """One row per measure × kind: mean with interval, and how far "lens" lies above it (paired, with interval; NaN for
    "lens" itself)."""
    rows = []
    for measure in ("output", "answer", "flipped", "moved"):
        table = trials.assign(value=trials[measure].astype(float)).pivot_table(
            index=["prompt_id", "cluster"], columns="kind", values="value", aggfunc="mean"
        )
        clusters = table.index.get_level_values("cluster").tolist()
        most = 1.0 if measure == "flipped" else np.inf  # nats and squares have no upper bound
        level = mean_intervals(table.to_numpy(), clusters, settings, bounds=(0.0, most))
        against = table["lens"].to_numpy()[:, None] - table.to_numpy()
        against[:, [kind == "lens" for kind in table.columns]] = np.nan
        gap = mean_intervals(against, clusters, settings, bounds=(-most, most))
        for i, kind in enumerate(table.columns):
            rows.append(
                {
                    "measure": measure,
                    "kind": kind,
                    **level.iloc[i].to_dict(),
                    "lens_minus": gap["mean"][i],
                    "lens_minus_lower": gap["lower"][i],
                    "lens_minus_upper": gap["upper"][i],
                }
            )
    return pd.DataFrame(rows)


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure and words."""
    effects = trials["effects"]
    points, summary = points_of(effects), summary_of(effects, plan.settings)
    caption = (
        "What ablating one direction does to the model's own output and to the first answer token, by kind of "
        f"direction, and each direction's effect against the lens's energy; {per_cent(plan.settings.level)} intervals "
        "over clusters."
    )
    return Findings(
        [Section(text_of(plan, points, summary), form="plain")],
        {"directions": points, "summary": summary},
        lambda: figures(summary, points, plan.settings.level),
        {"causal": caption},
        files={"effects.parquet": effects.to_parquet(index=False)},
    )


def text_of(plan: Plan, points: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What the command prints."""
    lines = [
        f"lens {plan.lens}: {plan.directions} directions of each kind at {len(plan.latents)} latents × "
        f"{len(plan.layers)} layers, each ablated alone; {plan.evaluation}; directions from {plan.derivation}"
    ]
    for measure, words in (
        ("output", "KL of the model's own output at that latent, nats"),
        ("answer", "KL of the first answer token, nats"),
        ("flipped", "first answer token changed, fraction"),
    ):
        kinds = summary[summary["measure"] == measure].set_index("kind").to_dict(orient="index")
        said = [f"{kind} {span(row['mean'], row['lower'], row['upper'], 4)}" for kind, row in kinds.items()]
        for kind in ("random", "covariance", "component"):
            other = kinds[kind]
            less = span(other["lens_minus"], other["lens_minus_lower"], other["lens_minus_upper"], 4)
            said.append(f"lens − {kind} {less}")
        lines.append(f"  {words}: {'; '.join(said)}")
    every = spearmanr(points["energy"], points["output"]).statistic
    inside = [
        spearmanr(cell["energy"], cell["output"]).statistic
        for _, cell in points.groupby(["latent", "layer"])
        if cell["energy"].nunique() > 1 and cell["output"].nunique() > 1
    ]
    lines.append(
        f"  rank correlation of the lens's energy with the effect on the model's output: {every:+.2f} over all "
        f"{len(points)} directions, {float(np.mean(inside or [np.nan])):+.2f} mean within a latent × layer"
    )
    return "\n".join(lines)


def figures(summary: pd.DataFrame, points: pd.DataFrame, level: float) -> dict[str, Figure]:
    """The one figure."""
    from experiments.lens.figures import causal_figure

    return {"causal": causal_figure(summary, points, level)}


# --- Command ----------------------------------------------------------------------------------------------------------


def identity(options: CausalOptions, model: CodiModel, prompts: Split) -> dict[str, object]:
    """What decides the result: the lens and both sides of the prompts too."""
    lens = "" if options.read == ("plain",) else lens_hash(options.lens)
    return lens_identity(options, model, lens=lens, split=prompts.record())


STUDY = Study(
    options=CausalOptions,
    title="Ablation of what a lens reads",
    prompts=lambda options, model: options.load_split(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=identity,
)

run = STUDY.run


def main(options: CausalOptions) -> None:
    """Load, run, print the summary."""
    print(printed(run_study(STUDY, options, say=to_stderr), "Tables and figure: "))
