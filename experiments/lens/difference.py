"""`codi lens difference`: the lens on mean_A − mean_B, for all pairs of latents and all layers.

Trials: `difference`, a part per lens: the most probable tokens of every cell (rows are not answers). Means are streamed
over all prompts, and over each half of the clusters for how much of a cell is not noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import CodiModel
from experiments.lens.options import TOP, DifferenceOptions
from experiments.lens.prompts import batches, clusters_of, printed, sizes
from experiments.lens.saved import load_lens, reading_identity
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.study.spellings import number_tokens, token_text
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lenses.latent_lens import LatentLens, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STUDY", "LayerMeans", "Plan", "difference_claims", "difference_table", "latent_means", "main", "run"]

DIFFERENCE = pa.schema(
    {
        "lens": pa.string(),
        "source": pa.int16(),
        "target": pa.int16(),
        "layer": pa.int16(),
        "norm": pa.float64(),
        "overlap": pa.float64(),
        "numbers": pa.float64(),
        "rank": pa.int16(),
        "token_id": pa.int32(),
        "token": pa.string(),
        "probability": pa.float64(),
    }
)
"""source is A, target B; the columns are those of `difference_table`."""


# --- Means and tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMeans:
    """Mean states (latent 1..n, layer, d_model) float64 over all prompts, and over each half of the clusters."""

    mean: Tensor
    halves: tuple[Tensor, Tensor]
    n: int
    n_clusters: int


def _check(model: CodiModel, problems: Sequence[Problem]) -> list[str]:
    """Names of the clusters.

    Raises:
        ValueError: fewer than two clusters, or fewer than two latents.
    """
    if model.n_latents < 2:
        raise ValueError(f"a difference needs at least 2 latents, {model.name} has {model.n_latents}")
    clusters = sorted(set(clusters_of(problems)))
    if len(clusters) < 2:
        raise ValueError(f"means in two halves need at least 2 clusters of prompts, got {len(clusters)}")
    return clusters


@torch.no_grad()
def latent_means(
    model: CodiModel,
    problems: Sequence[Problem],
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> LayerMeans:
    """Mean hidden state of every latent and layer, streamed; halves are a seeded division of the clusters.

    Raises:
        ValueError: fewer than two clusters, or fewer than two latents.
    """
    clusters = _check(model, problems)
    order = np.random.default_rng(seed).permutation(len(clusters))
    half = {clusters[c]: i % 2 for i, c in enumerate(order)}
    of_prompt = [half[cluster] for cluster in clusters_of(problems)]
    sums = torch.zeros(2, model.n_latents, model.n_layers + 1, model.d_model, dtype=torch.float64)
    counts = [0, 0]
    for rows in batches(problems, batch_size):
        batch = model.encode([problems[i].question for i in rows])
        run = model.rollout(batch, model.n_latents, keep=("hidden_states",))
        assert run.hidden_states is not None
        side = torch.tensor([of_prompt[i] for i in rows]).to(run.hidden_states.device)
        for i in (0, 1):
            sums[i] += run.hidden_states[side == i].double().sum(dim=0).cpu()
            counts[i] += int((side == i).sum())
        advance(len(rows))
    halves = (sums[0] / counts[0], sums[1] / counts[1])
    return LayerMeans(sums.sum(dim=0) / sum(counts), halves, sum(counts), len(clusters))


@torch.no_grad()
def difference_table(
    model: CodiModel, lenses: Sequence[LatentLens], means: LayerMeans, k: int = TOP, bias: bool = False
) -> pd.DataFrame:
    """Difference lens: the lens on mean_A − mean_B, for all ordered pairs and layers.

    Args:
        model: the model.
        lenses: see `LatentLens.difference_logits`; a lens per latent is used with the translators of A.
        means: from `latent_means`.
        k: tokens per cell.
        bias: read the difference as if it were a state (published).

    Returns:
        Rows lens, source (A), target (B), layer, norm (of the difference), overlap (share of the k tokens that both
        halves of the prompts have in common: how much of a cell is not noise), numbers (share of number tokens among
        the k), rank, token_id, token, probability.
    """
    numeric = number_tokens(model)
    k = min(k, model.vocab_size)
    every = range(1, model.n_latents + 1)
    rows = []
    for lens in lenses:
        for a, b in ((a, b) for a in every for b in every if a != b and lens.reads(a)):
            for layer in range(model.n_layers + 1):
                cell = _Cell(lens, a, b, layer, bias, model.device)
                top = cell.logits(means.mean).softmax(-1).topk(k)
                first, second = (set(cell.logits(half).topk(k).indices.tolist()) for half in means.halves)
                tokens = top.indices.tolist()
                shared = {
                    "lens": lens.name,
                    "source": a,
                    "target": b,
                    "layer": layer,
                    "norm": float(cell.difference(means.mean).norm()),
                    "overlap": len(first & second) / k,
                    "numbers": float(numeric[tokens].mean()),
                }
                for rank, (token, p) in enumerate(zip(tokens, top.values.tolist(), strict=True), 1):
                    text = token_text(model, token)
                    rows.append({**shared, "rank": rank, "token_id": token, "token": text, "probability": p})
    return pd.DataFrame(rows, columns=DIFFERENCE.names)


@dataclass(frozen=True)
class _Cell:
    """One pair at one layer through one lens."""

    lens: LatentLens
    source: int
    target: int
    layer: int
    bias: bool
    device: torch.device

    def difference(self, mean: Tensor) -> Tensor:
        """mean_A − mean_B (d_model,) of means (latent, layer, d_model)."""
        return mean[self.source - 1, self.layer] - mean[self.target - 1, self.layer]

    def logits(self, mean: Tensor) -> Tensor:
        """What the lens reads in it (vocab,)."""
        difference = self.difference(mean).float().to(self.device)
        return self.lens.difference_logits(difference, self.layer, self.source, self.bias)


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    lenses: tuple[str, ...]
    folder: str
    bias: bool
    figure_layers: tuple[int, ...]
    batch_size: int
    seed: int
    n: int
    n_clusters: int


def make_plan(options: DifferenceOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: layers that the model does not have, lenses that are not there, too few latents or clusters.
    """
    n, layers = model.n_layers, options.figure_layers
    if layers is None:
        layers = tuple(range(n + 1)) if n <= 8 else tuple(sorted({round(i * n / 4) for i in range(5)}))
    wrong = [layer for layer in layers if not 0 <= layer <= n]
    if wrong:
        raise ValueError(f"figure-layers must be in 0..{n}, got {wrong[0]}")
    clusters = _check(model, prompts.evaluation)
    load_lens(options.read, options.lens, model)
    return Plan(
        lenses=options.read,
        folder=str(options.lens),
        bias=options.bias == "published",
        figure_layers=tuple(dict.fromkeys(layers)),
        batch_size=options.batch_size,
        seed=options.seed,
        n=len(prompts.evaluation),
        n_clusters=len(clusters),
    )


def parts(plan: Plan) -> list[Part]:
    """One trial table, a part per lens."""
    shared = {"folder": plan.folder, "bias": plan.bias, "batch_size": plan.batch_size}
    return [
        Part(f"difference-{slug(name)}", tokens, {"lens": name, **shared}, plan.seed, DIFFERENCE, "difference")
        for name in plan.lenses
    ]


def tokens(bench: Workbench, *, lens: str, folder: str, bias: bool, batch_size: int, seed: int) -> pd.DataFrame:
    """What one lens reads in every difference."""
    means = bench.once(means_of, batch_size, seed)
    return difference_table(bench.model, load_lens((lens,), Path(folder), bench.model), means, bias=bias)


def means_of(bench: Workbench, batch_size: int, seed: int) -> LayerMeans:
    """Means over the evaluation prompts."""
    problems = bench.prompts.evaluation
    with bench.bar(len(problems), "prompt", "means") as advance:
        return latent_means(bench.model, problems, batch_size, seed, advance)


# --- Findings ---------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Table, figures, claims and words."""
    table = trials["difference"]
    return Findings(
        [Section(text_of(plan, table), form="plain")],
        {"difference": table},
        lambda: figures(plan, table),
        {
            f"difference-layer-{layer}": f"Most probable tokens of mean A − mean B at layer {layer}, for all pairs."
            for layer in plan.figure_layers
        },
        difference_claims(table, plan.n, plan.n_clusters),
    )


def text_of(plan: Plan, table: pd.DataFrame) -> str:
    """What the command prints."""
    cells = table[table["rank"] == 1]
    lines = [f"mean_A − mean_B over {sizes(plan.n, plan.n_clusters)}; per lens and layer, over all pairs:"]
    for (lens, depth), rows in cells.groupby(["lens", "layer"], sort=False):
        same = (rows["source"] - rows["target"]) % 2 == 0
        common = rows["token"].value_counts()
        lines.append(
            f"  {lens}, layer {depth}: halves of the prompts agree on {rows['overlap'].mean():.2f} of the top {TOP}; "
            f"number tokens {rows['numbers'].mean():.2f} (A, B of equal parity {rows['numbers'][same].mean():.2f}, of "
            f"unequal {rows['numbers'][~same].mean():.2f}); {len(common)} different first tokens in {len(rows)} cells"
        )
    return "\n".join(lines)


def difference_claims(table: pd.DataFrame, n: int, n_clusters: int) -> ClaimsTable:
    """S6 per lens: do cells of the grid whose latents have the same parities share their tokens more than others do?

    Statistic: overlap (share of the top tokens in common) of two cells with the same (parity of A, parity of B), minus
    that of other two cells, mean over layers. p: all relabellings of the latents into two groups of these sizes. There
    is no interval of it, so that a pattern can be found but not excluded.
    """
    claims = ClaimsTable()
    latents = sorted(set(table["source"]) | set(table["target"]))
    for lens, rows in table.groupby("lens", sort=False):
        cells, alike = _shared_tokens(rows)
        upper = np.triu_indices(len(cells), 1)

        def statistic(group: tuple[int, ...], cells: Any = cells, alike: Any = alike, upper: Any = upper) -> float:
            kind = np.array([2 * (a in group) + (b in group) for a, b in cells])
            same = (kind[:, None] == kind[None, :])[upper]
            return float(alike[upper][same].mean() - alike[upper][~same].mean())

        odd = tuple(k for k in latents if k % 2)
        observed = statistic(odd)
        every = [statistic(group) for group in combinations(latents, len(odd))]
        p = float(np.mean([value >= observed - 1e-12 for value in every]))
        smallest = (2 if 2 * len(odd) == len(latents) else 1) / len(every)  # a group and its complement are one pattern
        claims.add(
            Claim(
                f"S6, lens {lens}",
                "the difference lens shows no pattern over A and B",
                "overlap of the top tokens of cells with equal parities minus that of the others; not held if p < 0.05",
                "not testable" if smallest >= 0.05 else "not held" if p < 0.05 else "undecided",
                observed,
                n=n,
                n_clusters=n_clusters,
                note=f"p = {p:.3f} over {len(every)} relabellings of the latents, of which the smallest possible is "
                f"{smallest:.3f}: "
                + ("too few latents to find any pattern" if smallest >= 0.05 else "not found is not excluded"),
            )
        )
    return claims


def _shared_tokens(rows: pd.DataFrame) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Cells (A, B) of one lens, and the share of top tokens that two cells have in common (cell, cell), mean over
    layers."""
    cells = sorted({(int(a), int(b)) for a, b in zip(rows["source"], rows["target"], strict=True)})
    alike = np.zeros((len(cells), len(cells)))
    for _, layer in rows.groupby("layer"):
        found = {key: set(cell["token_id"]) for key, cell in layer.groupby(["source", "target"])}
        size = max(map(len, found.values()))
        alike += [[len(found[x] & found[y]) / size for y in cells] for x in cells]
    return cells, alike / rows["layer"].nunique()


def figures(plan: Plan, table: pd.DataFrame) -> dict[str, Figure]:
    """A figure per layer."""
    from experiments.lens.figures import difference_figure

    remark = f"{sizes(plan.n, plan.n_clusters)}."
    return {f"difference-layer-{layer}": difference_figure(table, layer, remark) for layer in plan.figure_layers}


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=DifferenceOptions,
    title="Lenses on differences of latents",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=reading_identity,
)

run = STUDY.run


def main(options: DifferenceOptions) -> None:
    """Load, run, print the summary."""
    print(printed(run_study(STUDY, options, say=to_stderr), "Table and figures: "))
