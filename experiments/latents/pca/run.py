"""`codi pca`: principal components of latents and cache entries; where each edit's effect goes.

components   PCA over the latents of derivation prompts, of all latents together and of each one: z, h, content
             keys, raw keys, values, and keys and values together ("kv"). Share of variance; cosine of the
             components with the end-of-thought embedding (beside every other token's) and with the steering
             directions A−B (beside random directions); how well the first two components tell even from odd
             latents on the evaluation prompts, beside every other way to divide the latents into two equal groups.
along        steering along the components (one standard deviation of their scores, both signs) against random
             directions of the same norm; early exit; embedding and kv space.
grid         the steering of the published study, small: all pairs, |c| 0.5 and 1, kv, embedding and hidden space, early
             exit, and kv pushed through one more latent; random directions of the same norms beside them.
where        why does KV steering act where embedding steering does not? For mean differences (c = ±1) and random
             directions of their norms, in every space: size of the edit against the natural spread over prompts of what
             is edited, what arrives in the cache slot, attention of the end-of-thought token to the slot,
             change at that token layer by layer, KL of the answer, and what is left of all that after the next
             latent and at the end.

--legacy: the published prompts and means over these prompts themselves.

Runs as `codi pca` or `python -m experiments.latents.pca.run`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from codi.branches import decode_branches
from codi.decode import decode_answers, default_new_tokens
from codi.forced import divergence, forced
from experiments.figures.series import from_zero
from experiments.figures.style import legend, look
from experiments.statistics.clusters import Settings, cluster_sums, interval_of
from experiments.study.claims import Claim, ClaimsTable, judge
from experiments.study.shared import (
    PALETTE,
    Result,
    StudyOptions,
    answer_table,
    compare,
    draw_series,
    effect_claim,
    interval,
    levels,
    load_model,
    load_prompts,
    new_figure,
    open_study,
    p_text,
    row_of,
    stderr,
    think,
)
from experiments.study.thoughts import collect_means
from experiments.sweep.cells import cell_statistics
from experiments.sweep.grid import GridOptions, conditions, directions
from experiments.sweep.run import run_part
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lm.terms import Part, Space
from lm.terms import Timing as GridTiming
from steering.directions import Direction, difference, generator, random_direction
from steering.interventions import AddDirection, Edit, branches, edit_table
from steering.means import content_keys

if TYPE_CHECKING:
    from codi import CodiModel
    from steering.means import LatentMeans

__all__ = ["Components", "Config", "main", "parity_share", "principal_components", "run"]

QUANTITIES = ("z", "h", "keys", "raw keys", "values", "kv")
KINDS: tuple[tuple[str, Space, Part], ...] = (
    ("kv", "kv", "both"), ("keys", "kv", "keys"), ("values", "kv", "values"),
    ("embedding", "embedding", "both"), ("hidden", "hidden", "both"),
)  # fmt: skip
#: cells that the published grid names as improvements at latent 5, as (A, B, c) of this project: its label A-B is B−A
PUBLISHED_CELLS = tuple(
    (a, b, -c) for a, b in ((1, 2), (1, 5), (2, 3), (2, 4), (3, 5), (4, 5)) for c in (0.5, 1.0)
) + tuple((a, b, 1.0) for a, b in ((1, 4), (1, 6), (4, 6), (5, 6)))


@dataclass(frozen=True)
class Config(StudyOptions):
    """Principal components of latents and cache entries; where each edit's effect goes."""

    out: Path = Path("runs/pca")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    task: str = "arithmetic"
    """Prompts: arithmetic, templates, a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id."""
    min_steps: int | None = 3
    """Only problems of at least this many steps; None: no bound. Not used for templates."""
    max_steps: int | None = 5
    """Only problems of at most this many steps; None: no bound. Not used for templates."""
    limit: int | None = 48
    """Number of evaluation prompts (a seeded choice); None: all."""
    derivation: int = 280
    """Prompts for means and components; they share no question and no numbers with the evaluation prompts."""
    draws: int = 20
    """Random directions beside the steering grid and the components."""
    top: int = 10
    """Components in the tables."""
    steered: int = 3
    """Components that are steered along."""
    where_pairs: int = 3
    """Pairs A−B (a seeded choice) whose effect is followed through the model."""
    where_prompts: int = 32
    """Evaluation prompts on which it is followed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "steered", "where_pairs", "where_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


# --- Components -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """Principal components of some rows.

    Attributes:
        mean: (feature,).
        vectors: (component, feature), orthonormal, largest variance first; each one's largest coordinate is positive.
        variances: (component,) of the scores.
        total: variance over all components together.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor
    total: float

    @property
    def shares(self) -> Tensor:
        """(component,) share of the total variance; 0 where there is none at all."""
        return self.variances / self.total if self.total > 0 else torch.zeros_like(self.variances)

    def scores(self, x: Tensor, number: int) -> Tensor:
        """Scores (…, number) of rows (…, feature) on the first components."""
        return (x.double() - self.mean) @ self.vectors[:number].T


def principal_components(x: Tensor, number: int) -> Components:
    """The first principal components of rows (row, feature), in float64; fewer if the rows have not that many."""
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"principal components need at least 2 rows (row, feature), got {tuple(x.shape)}")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    number = min(number, len(x) - 1, x.shape[1])
    if x.shape[0] < x.shape[1]:
        values, left = torch.linalg.eigh(centred @ centred.T)
        vectors = centred.T @ left
        vectors = vectors / vectors.norm(dim=0).clamp_min(1e-300)
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors.flip(1)[:, :number].T.contiguous()
    variances = values.flip(0)[:number].clamp_min(0) / (len(x) - 1)
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return Components(mean, vectors * largest.sign(), variances, float(centred.square().sum() / (len(x) - 1)))


def _quantities(model: CodiModel, problems: Sequence[Problem], batch_size: int) -> dict[str, Tensor]:
    """name -> (prompt, latent, feature) float32 on the CPU; h at latent k is h_{k-1}, which z_k is projected from."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for start in range(0, len(problems), batch_size):
        chunk = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(chunk), model.n_latents, keep=("embeddings", "keys", "values"))
        assert run.embeddings is not None and run.keys is not None and run.values is not None
        content = content_keys(run, model).float().flatten(2)
        values = run.values.float().flatten(2)
        for name, tensor in (
            ("z", run.embeddings.float()), ("h", run.states[:, :-1].float()), ("keys", content),
            ("raw keys", run.keys.float().flatten(2)), ("values", values), ("kv", torch.cat((content, values), -1)),
        ):  # fmt: skip
            parts[name].append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def parity_share(scores: np.ndarray, groups: Sequence[int]) -> float:
    """Share of the variance of scores (prompt, latent, component) that lies between two groups of latents.

    Args:
        scores: of prompts and latents.
        groups: latents (1-based) of the first group; the others are the second.
    """
    member = np.isin(np.arange(1, scores.shape[1] + 1), groups)
    grand = scores.mean((0, 1))
    total = ((scores - grand) ** 2).sum()
    between = sum(
        scores.shape[0] * part.sum() * ((scores[:, part].mean((0, 1)) - grand) ** 2).sum() for part in (member, ~member)
    )
    return float(between / total) if total > 0 else 0.0


def _parity_interval(
    scores: np.ndarray, divisions: Sequence[tuple[int, ...]], clusters: np.ndarray, settings: Settings
) -> tuple[float, float]:
    """Interval of the lead of the first division: its `parity_share` minus the largest of the others.

    Args:
        scores: (prompt, latent, component).
        divisions: first groups of latents (1-based); the others are the second groups.
        clusters: (prompt,) number of each prompt's cluster.
        settings: resamples, level, seed.
    """
    if len(divisions) < 2:
        return np.nan, np.nan
    n_prompts, n, components = scores.shape
    centred = scores - scores.mean((0, 1))
    member = np.array([np.isin(np.arange(1, n + 1), group) for group in divisions], float)  # division, latent
    columns = np.column_stack([centred.reshape(n_prompts, -1), (centred**2).sum((1, 2)), np.ones(n_prompts)])

    def lead(sums: np.ndarray) -> np.ndarray:
        prompts = sums[:, -1]
        means = sums[:, :-2].reshape(-1, n, components) / prompts[:, None, None]
        grand = means.mean(1, keepdims=True)
        total = sums[:, -2] - prompts * n * (grand**2).sum((1, 2))
        between = np.zeros((len(sums), len(member)))
        for side in (member, 1 - member):
            size = side.sum(1)  # division
            apart = np.einsum("dk,rkc->rdc", side, means) / size[:, None] - grand
            between += prompts[:, None] * size * (apart**2).sum(-1)
        share = np.where(total[:, None] > 0, between / total[:, None], 0.0)
        return share[:, 0] - share[:, 1:].max(1)

    sums, _ = cluster_sums(columns, clusters, int(clusters.max()) + 1)
    _, low, high = interval_of(
        lead, sums, weights=settings.weights(sums.shape[1]), n_clusters=sums.shape[1], level=settings.level
    )
    return float(low[0]), float(high[0])


def _divisions(n: int) -> list[tuple[int, ...]]:
    """Ways to divide latents 1..n into two groups of (nearly) equal size, each once; odd against even first."""
    half = n // 2
    odd = tuple(range(1, n + 1, 2)) if n % 2 == 0 else tuple(range(2, n + 1, 2))
    found = [odd]
    for group in itertools.combinations(range(1, n + 1), half):
        if (n % 2 or 1 in group) and set(group) != set(odd):
            found.append(group)
    return found


def component_tables(
    model: CodiModel, split: Split, means: LatentMeans, config: Config
) -> tuple[dict[str, pd.DataFrame], dict[str, Components]]:
    """Tables variance, alignment, token_alignment, parity and scores; and the components over all latents."""
    n = model.n_latents
    data = _quantities(model, split.derivation, config.batch_size)
    held_out = _quantities(model, split.evaluation, config.batch_size)
    variance, alignment, tokens, parity, points = [], [], [], [], []
    found: dict[str, Components] = {}
    embedding = model.base.get_input_embeddings().weight.detach().double().cpu()
    cluster = np.unique([p.cluster or p.prompt_id for p in split.evaluation], return_inverse=True)[1]
    for name, x in data.items():
        pooled = found[name] = principal_components(x.flatten(0, 1), config.top)
        scopes = [("all", pooled)] + [(str(k), principal_components(x[:, k - 1], config.top)) for k in range(1, n + 1)]
        for scope, parts in scopes:
            for i, share in enumerate(parts.shares.tolist(), start=1):
                variance.append({"quantity": name, "latents": scope, "component": i, "share": share})
        if name in ("z", "h"):
            cosines = embedding @ pooled.vectors.T / embedding.norm(dim=1, keepdim=True).clamp_min(1e-12)
            centred = embedding - embedding.mean(0)
            centred_cosines = centred @ pooled.vectors.T / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
            for i in range(len(pooled.vectors)):
                for what, table in (("plain", cosines), ("centred", centred_cosines)):
                    own = float(table[model.protocol.eot_id, i])
                    rank = int((table[:, i].abs() >= abs(own) - 1e-12).sum())
                    tokens.append(
                        {"quantity": name, "component": i + 1, "embedding": what, "cosine": own, "rank": rank,
                         "tokens": len(table), "p": rank / len(table)}
                    )  # fmt: skip
        for a, b in itertools.combinations(range(1, n + 1), 2):
            vector = _difference_of(means, name, a, b)
            length = float(vector.norm())
            if length == 0:
                continue
            cosine = pooled.vectors @ vector / length
            dimension = len(vector)
            alignment.append(
                {"quantity": name, "source": a, "target": b, "first": float(cosine[0].abs()),
                 "first_two": float(cosine[:2].square().sum()), "all_kept": float(cosine.square().sum()),
                 "random_first_two": min(1.0, 2 / dimension), "random_all_kept": min(1.0, len(cosine) / dimension)}
            )  # fmt: skip
        scores = pooled.scores(held_out[name], 2).numpy()
        divisions = _divisions(n)
        shares = np.array([parity_share(scores, group) for group in divisions])
        low, high = _parity_interval(scores, divisions, cluster, config.settings)
        parity.append(
            {"quantity": name, "share": shares[0], "best_other": shares[1:].max(initial=0.0),
             "difference": shares[0] - shares[1:].max(initial=0.0), "lower": low, "upper": high,
             "rank": int((shares >= shares[0] - 1e-12).sum()), "divisions": len(divisions),
             "n": len(scores), "n_clusters": int(cluster.max()) + 1}
        )  # fmt: skip
        for k in range(n):
            for row in range(len(scores)):
                points.append({"quantity": name, "latent": k + 1, "first": scores[row, k, 0],
                               "second": scores[row, k, 1] if scores.shape[-1] > 1 else 0.0})  # fmt: skip
    tables = {
        "variance": variance, "alignment": alignment, "token_alignment": tokens, "parity": parity, "scores": points,
    }  # fmt: skip
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}, found


def _difference_of(means: LatentMeans, name: str, a: int, b: int) -> Tensor:
    """Steering direction A−B of a quantity, flattened."""
    if name in ("z", "h"):
        vector = difference(means, a, b, "embedding" if name == "z" else "hidden").vector
        assert vector is not None
        return vector
    direction = difference(means, a, b, "kv", keys="raw" if name == "raw keys" else "content")
    assert direction.keys is not None and direction.values is not None
    keys, values = direction.keys.flatten(), direction.values.flatten()
    return {"keys": keys, "raw keys": keys, "values": values, "kv": torch.cat((keys, values))}[name]


def along_components(model: CodiModel, split: Split, found: dict[str, Components], config: Config) -> pd.DataFrame:
    """Trial table of steering along components: conditions "<space> <latent> <name>", early exit.

    Names: "none", "pc<i> <sign>", "random <i> <sign>": random directions with the norm of component i's edit.
    """
    n = model.n_latents
    thoughts = think(model, split.evaluation, keep=("embeddings", "keys", "values", "cache"))
    shape = (model.n_layers, model.n_kv_heads, model.d_head)
    frames = []
    for space, quantity in (("embedding", "z"), ("kv", "kv")):
        parts = found[quantity]
        table: list[Direction] = []
        names: list[tuple[str, int]] = []
        for i in range(min(config.steered, len(parts.vectors))):
            vector = parts.vectors[i] * parts.variances[i].sqrt()
            if float(vector.norm()) == 0:
                continue
            like = _as_direction(vector, space, shape)
            table.append(like)
            names.append((f"pc{i + 1}", 0))
            for draw in range(config.draws):
                rng = generator(config.seed, "pca", space, i, draw)
                noise = torch.from_numpy(rng.standard_normal(len(vector)))
                table.append(_as_direction(noise * vector.norm() / noise.norm(), space, shape))
                names.append((f"random {i + 1}", draw))
        edits, labels = [], []
        for latent in range(1, n + 1):
            edits.append(Edit(latent))
            labels.append((f"{space} {latent} none", latent, 0))
            for row, (name, draw) in enumerate(names):
                for sign in (1, -1):
                    edits.append(Edit(latent, row, float(sign)))
                    labels.append((f"{space} {latent} {name} {'+' if sign > 0 else '−'}", latent, draw))
        answers = decode_branches(
            model,
            thoughts.run,
            edit_table(table, model.device) if table else None,
            branches(edits, thoughts.run, cast(Space, space)),
            timing="early-exit",
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        size = len(thoughts)
        frames.append(
            answer_table(
                split.evaluation,
                torch.arange(size).repeat_interleave(len(edits)),
                answers.texts,
                condition=[label[0] for label in labels] * size,
                latent=[label[1] for label in labels] * size,
                draw=[label[2] for label in labels] * size,
                applied_norm=answers.applied_norm.numpy(),
            )
        )
    return pd.concat(frames, ignore_index=True)


def _as_direction(vector: Tensor, space: str, shape: tuple[int, int, int]) -> Direction:
    if space == "embedding":
        return Direction("embedding", vector=vector.double())
    keys, values = vector.double().chunk(2)
    return Direction("kv", keys=keys.reshape(shape), values=values.reshape(shape))


# --- The published grid, small ----------------------------------------------------------------------------------------


def grid_trials(model: CodiModel, split: Split, means: LatentMeans, config: Config) -> pd.DataFrame:
    """Trial table in the form of `codi sweep`: kv, embedding and hidden space, early exit; and kv with timing
    "continue" for one more latent (n_latents = edited latent + 1)."""
    n = model.n_latents
    pairs = tuple(itertools.permutations(range(1, n + 1), 2))
    tokens = default_new_tokens(model) if config.max_new_tokens is None else config.max_new_tokens
    frames = []
    jobs: list[tuple[Space, GridTiming, tuple[int, ...], int]] = [
        (space, "early-exit", tuple(range(1, n + 1)), n) for space in ("kv", "embedding", "hidden")
    ]
    jobs += [("kv", "continue", (k,), k + 1) for k in range(1, n)]
    for space, timing, latents, longest in jobs:
        options = GridOptions(
            spaces=(space,),
            timings=(timing,),
            pairs=pairs,
            latents=latents,
            coefficients=(-1.0, -0.5, 0.5, 1.0),
            controls=("random",),
            draws=config.draws,
            draw_norm="pooled",
            n_latents=longest,
            seed=config.seed,
        )
        table = edit_table(directions(options, space, means), model.device)
        for start in range(0, len(split.evaluation), 16):
            part = run_part(
                model,
                split.evaluation[start : start + 16],
                table,
                conditions(options, space, "both", timing),
                space,
                "both",
                timing,
                n_latents=longest,
                max_new_tokens=tokens,
            )
            frames.append(pd.DataFrame(part))
    found = pd.concat(frames, ignore_index=True)
    return found.astype({"correct": bool, "parsed": bool, "prediction": float})


def _grid_rates(trials: pd.DataFrame) -> pd.DataFrame:
    """Per-prompt outcomes of the grid: conditions "<space> <timing> <control> <latent>" (and " |c|=…"), with `changed`:
    the answer is not the unsteered one; and `gain`: right minus unsteered right."""
    trials = trials.assign(exit=np.where(trials["timing"] == "early-exit", trials["latent"], trials["n_latents"]))
    keys = ["space", "timing", "exit", "prompt_id"]
    base = trials[trials["control"] == "none"].drop_duplicates(keys).set_index(keys)[["text", "correct"]]
    base.columns = pd.Index(["text_base", "correct_base"])
    edited = trials[trials["control"] != "none"].join(base, on=keys)
    edited["changed"] = edited["text"] != edited["text_base"]
    edited["gain"] = edited["correct"].astype(float) - edited["correct_base"].astype(float)
    prefix = edited["space"] + " " + edited["timing"] + " " + edited["control"] + " "
    return edited.assign(condition=prefix + edited["latent"].astype(str), prefix=prefix)


# --- Where an effect goes ---------------------------------------------------------------------------------------------


def where_effects_go(model: CodiModel, split: Split, means: LatentMeans, config: Config) -> pd.DataFrame:
    """One row per edit kind, direction, control, sign, latent and prompt; every change is divided by the natural spread
    over prompts of what changes.

    Columns: edit (kv, keys, values, embedding, hidden), control (direction, random), latent, edit_size (of what is
    edited), slot (change of the cache slot of latent k), slot_next (of latent k + 1's), z_next (of z_{k+1}), h_last (of
    h_n), attention (of the end-of-thought token to slot k, mean over layers and heads, early exit, unedited),
    eot_<layer> (change at the end-of-thought token, early exit), kl (early exit), kl_next (one more latent),
    kl_end (all latents).
    """
    n, depth = model.n_latents, model.n_layers
    problems = split.evaluation[: config.where_prompts]
    thoughts = think(model, problems, keep=("embeddings", "keys", "values", "cache"))
    run = thoughts.run
    assert run.embeddings is not None and run.keys is not None and run.values is not None
    plain = {k: run.truncate(k) for k in range(1, n + 1)}
    tokens = {k: decode_answers(model, plain[k], config.max_new_tokens).tokens for k in plain}
    eager = model.attention == "eager"
    before = {k: forced(model, plain[k], tokens[k], hidden_states=True, attentions=eager) for k in plain}

    def spread(x: Tensor) -> float:
        """Root mean square distance from the mean over prompts, all features together; at least a thousandth of the
        root mean square norm, so that what never changes is no divisor."""
        flat = x.double().flatten(1)
        floor = 1e-3 * float(flat.square().sum(1).mean().sqrt())
        return max(float((flat - flat.mean(0)).square().sum(1).mean().sqrt()), floor, 1e-9)

    slots = torch.cat((content_keys(run, model).to(run.values.dtype), run.values), dim=-1)  # (prompt, latent, ...)
    slot_spread = [spread(slots[:, k]) for k in range(n)]
    z_spread = [spread(run.embeddings[:, k]) for k in range(n)]
    h_spread = [spread(run.states[:, k]) for k in range(n + 1)]
    everything = list(itertools.combinations(range(1, n + 1), 2))
    order = generator(config.seed, "pca", "pairs").permutation(len(everything))[: config.where_pairs]
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    labels: list[dict[str, Any]] = []
    size = len(problems)

    def relative(x: Tensor, y: Tensor, scale: float) -> np.ndarray:
        return ((x - y).double().flatten(1).norm(dim=1) / scale).cpu().numpy()

    for pair in sorted(order.tolist()):
        a, b = everything[pair]
        for name, space, part in KINDS:
            mean_difference = difference(means, a, b, space)
            rng = generator(config.seed, "pca", "where", name, a, b)
            for control, direction in (
                ("direction", mean_difference), ("random", random_direction(mean_difference, rng))
            ):  # fmt: skip
                for sign, k in itertools.product((1.0, -1.0), range(1, n + 1)):
                    edit = AddDirection(direction, k, sign, part=part)
                    edited = model.rollout(thoughts.prefill, n, [edit], keep=("embeddings", "keys", "values", "cache"))
                    assert edited.embeddings is not None and edited.values is not None
                    new = torch.cat((content_keys(edited, model).to(edited.values.dtype), edited.values), dim=-1)
                    after = forced(model, edited.truncate(k), tokens[k], hidden_states=True)
                    assert after[2] is not None and before[k][2] is not None
                    slot = relative(new[:, k - 1], slots[:, k - 1], slot_spread[k - 1])
                    norm = direction.norm()
                    if space == "kv":
                        edit_size = slot
                    else:
                        own = z_spread[k - 1] if space == "embedding" else h_spread[k - 1]
                        edit_size = np.full(size, norm / own)
                    entry: dict[str, np.ndarray] = {
                        "edit_size": edit_size,
                        "slot": slot,
                        "h_last": relative(edited.states[:, -1], run.states[:, -1], h_spread[n]),
                        "kl": divergence(before[k][0], after[0], before[k][1]).cpu().numpy(),
                        "slot_next": np.full(size, np.nan),
                        "z_next": np.full(size, np.nan),
                        "kl_next": np.full(size, np.nan),
                    }
                    for layer in range(depth + 1):
                        old, changed = before[k][2][:, layer], after[2][:, layer]  # type: ignore[index]
                        entry[f"eot_{layer}"] = relative(changed, old, spread(old))
                    weights = before[k][3]
                    if weights is not None:
                        place = run.prompt_width + k - 1
                        entry["attention"] = weights[..., place].double().mean((1, 2)).cpu().numpy()
                    else:
                        entry["attention"] = np.full(size, np.nan)
                    if k < n:
                        entry["slot_next"] = relative(new[:, k], slots[:, k], slot_spread[k])
                        entry["z_next"] = relative(edited.embeddings[:, k], run.embeddings[:, k], z_spread[k])
                        logp = forced(model, edited.truncate(k + 1), tokens[k + 1])[0]
                        entry["kl_next"] = divergence(before[k + 1][0], logp, before[k + 1][1]).cpu().numpy()
                    logp = forced(model, edited, tokens[n])[0]
                    entry["kl_end"] = divergence(before[n][0], logp, before[n][1]).cpu().numpy()
                    for column, changes in entry.items():
                        rows[column].append(changes)
                    labels.append(
                        {"edit": name, "control": control, "source": a, "target": b, "sign": sign, "latent": k}
                    )
    frame = pd.DataFrame([label for label in labels for _ in range(size)])
    for column, changes_of in rows.items():
        frame[column] = np.concatenate(changes_of)
    frame["prompt_id"] = [problem.prompt_id for problem in problems] * len(labels)
    frame["cluster"] = [problem.cluster or problem.prompt_id for problem in problems] * len(labels)
    frame["draw"] = 0
    frame["condition"] = frame["edit"] + " " + frame["control"]
    return frame


# --- The study --------------------------------------------------------------------------------------------------------


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model: trials, tables, figures, claims and summary in the run folder.

    Attention to the edited slot is measured only if the model was loaded with attention="eager".
    """
    n, settings = model.n_latents, config.settings
    if n < 3:
        raise ValueError(f"pca needs a model with at least 3 latents, got {n}")
    with open_study("pca", config, model, split, say) as study:
        held: list[LatentMeans] = []

        def means() -> LatentMeans:
            if not held:
                held.append(collect_means(model, split.derivation, metadata={})[0])
            return held[0]

        tables, found = component_tables(model, split, means(), config)
        along = study.part("along", lambda: along_components(model, split, found, config))
        contrasts = [
            (name, f"{' '.join(name.split()[:2])} none") for name in along["condition"].unique() if " pc" in name
        ]
        against = [(name, name.replace(" pc", " random ")) for name, _ in contrasts]
        tables["along_baseline"] = compare(along, contrasts, settings=settings)
        tables["along_random"] = compare(along, against, settings=settings)
        grid = study.part("grid", lambda: grid_trials(model, split, means(), config))
        early = grid[grid["timing"] == "early-exit"]
        tables["cells"] = cell_statistics(early, settings, mirrored=False)
        rates = _grid_rates(grid)
        tables["grid_changed"] = levels(rates, "changed", settings)
        pairs = [
            (name, name.replace(" direction ", " random "))
            for name in rates["condition"].unique()
            if "direction" in name
        ]
        tables["grid_over_random"] = compare(rates, pairs, "gain", settings)
        tables["grid_changed_over_random"] = compare(rates, pairs, "changed", settings)
        where = study.part("where", lambda: where_effects_go(model, split, means(), config))
        tables.update(where_tables(where, model.n_layers, settings))
        for name, table in tables.items():
            study.table(name, table)
        study.draw(lambda: figures(tables, where, n, model.n_layers))
        claims = published_claims(tables, rates, n, settings)
        text = study.finish(
            f"Principal components and effects of edits: {model.name}", words(tables, n, model.n_layers, config), claims
        )
        return Result(study.path, tables, claims, text)


MEASURES = ("edit_size", "slot", "attention", "kl", "z_next", "slot_next", "kl_next", "h_last", "kl_end")


def where_tables(where: pd.DataFrame, depth: int, settings: Settings) -> dict[str, pd.DataFrame]:
    """Tables where (mean of every measure, per edit and control) and where_contrasts (KV against embedding)."""
    frames = []
    for measure in (*MEASURES, *(f"eot_{layer}" for layer in range(depth + 1))):
        known = where[where[measure].notna()]
        if len(known):
            frames.append(levels(known, measure, settings).assign(measure=measure))
    contrasts = []
    for measure in ("kl", "kl_next", "kl_end", "slot", "h_last"):
        part = where[where[measure].notna()]
        pairs = [("kv direction", "embedding direction"), ("kv direction", "hidden direction"),
                 ("kv direction", "kv random"), ("embedding direction", "embedding random"),
                 ("keys direction", "values direction")]  # fmt: skip
        contrasts.append(compare(part, pairs, measure, settings).assign(measure=measure))
    return {
        "where": pd.concat(frames, ignore_index=True),
        "where_contrasts": pd.concat(contrasts, ignore_index=True),
    }


def published_claims(tables: dict[str, pd.DataFrame], rates: pd.DataFrame, n: int, settings: Settings) -> ClaimsTable:
    """S4, S5, S7 and S8."""
    claims = ClaimsTable()
    cells = tables["cells"]
    better = cells[cells["verdict"] == "improvement"].groupby("space").size()
    base = float(cells["baseline"].max())
    for space, name, statement in (
        ("embedding", "S4 (baseline)", "embedding steering never beats the baseline"),
        ("kv", "S5 (any)", "some KV directions beat the baseline and random directions"),
    ):
        count = int(better.get(space, 0))
        number = int((cells["space"] == space).sum())
        held = count == 0 if space == "embedding" else count > 0
        note = f"{count} of {number} cells are improvements after correction; best unsteered accuracy {base:.2f}"
        part = cells[cells["space"] == space]
        best = part.sort_values("difference").iloc[-1]
        claims.add(
            effect_claim(name, statement,
                   "cells above baseline and random directions, corrected; number of the best cell", "held" if
                   held else "not held", best, note)
        )  # fmt: skip
    for k in (n - 1, n):
        row = row_of(tables["grid_over_random"], f"embedding early-exit direction {k}")
        claims.add(
            effect_claim(f"S4 (random, latent {k})", "embedding steering is at the random level at later latents",
                   "accuracy, directions minus random ones, is within ±0.03",
                   judge(row["lower"], row["upper"], above=-0.03, below=0.03), row)
        )  # fmt: skip
    kv = rates[(rates["space"] == "kv") & (rates["timing"] == "early-exit") & (rates["control"] == "direction")]
    if n == 6:
        named = pd.Series(
            list(zip(kv["source"], kv["target"], kv["coefficient"], strict=True)), index=kv.index
        ).isin(PUBLISHED_CELLS)  # fmt: skip
        at_five = kv[named & (kv["latent"] == 5)]
        both = pd.concat([
            at_five.assign(condition="named", value=at_five["gain"]), at_five.assign(condition="zero", value=0.0)
        ])  # fmt: skip
        row = row_of(compare(both, [("named", "zero")], "value", settings), "named")
        claims.add(
            effect_claim("S5 (named cells)", "the KV cells named as better at latent 5 are better",
                   "mean change of accuracy over these 16 cells is above 0",
                   judge(row["lower"], row["upper"], above=0.0), row)
        )  # fmt: skip
        five = kv.assign(condition=np.where(kv["latent"] == 5, "five", "others"))
        row = row_of(compare(five, [("five", "others")], "changed", settings), "five")
        claims.add(
            effect_claim("S5 (latent 5)", "KV steering acts mainly at latent 5",
                   "share of changed answers, latent 5 minus the other latents, is above 0",
                   judge(row["lower"], row["upper"], above=0.0), row)
        )  # fmt: skip
    sizes = kv.assign(condition=np.where(kv["coefficient"].abs() == 1, "one", "half"))
    row = row_of(compare(sizes, [("one", "half")], "gain", settings), "one")
    claims.add(
        effect_claim("S5 (|c|)", "accuracy falls with |c|", "accuracy at |c| = 1 minus |c| = 0.5 is below 0",
               judge(row["lower"], row["upper"], below=0.0), row)
    )  # fmt: skip
    parity = tables["parity"].rename(columns={"quantity": "condition"})
    for name in ("z", "keys", "values"):
        row = row_of(parity, name)
        separated = judge(row["lower"], row["upper"], above=0.0)
        apart = name == "z"
        verdict = separated if apart else ("not held" if separated == "held" else "held")
        claims.add(
            effect_claim(f"S7 ({name})",
                   "the first two components separate even and odd latents" if apart
                   else "the first two components of cache entries do not",
                   "variance between even and odd, minus the best other division of the latents, is "
                   + ("above 0" if apart else "not above 0"), verdict, row,
                   f"rank {row['rank']} of {row['divisions']} divisions; share of variance {row['share']:.2f}")
        )  # fmt: skip
    tokens = tables["token_alignment"]
    first = tokens[(tokens["quantity"] == "z") & (tokens["component"] == 1) & (tokens["embedding"] == "plain")].iloc[0]
    claims.add(
        Claim("S7 (end of thought)", "the first component is parallel to the end-of-thought direction",
              "|cosine| is above 0.5 and among the 1 % largest of all tokens",
              "held" if abs(first["cosine"]) > 0.5 and first["p"] <= 0.01 else "not held", float(first["cosine"]),
              n=int(first["tokens"]), note=f"rank {first['rank']} of {first['tokens']} tokens by |cosine|")
    )  # fmt: skip
    later = rates[(rates["space"] == "kv") & (rates["timing"] == "continue")]
    later = later.assign(condition=later["control"])
    row = row_of(compare(later, [("direction", "random")], "gain", settings), "direction")
    claims.add(
        effect_claim("S8", "KV steering pushed through one more latent is like random",
               "accuracy, directions minus random ones, is within ±0.02",
               judge(row["lower"], row["upper"], above=-0.02, below=0.02), row)
    )  # fmt: skip
    return claims


def words(tables: dict[str, pd.DataFrame], n: int, depth: int, config: Config) -> list[str]:
    """The summary, paragraph by paragraph."""
    variance = tables["variance"]
    lines = [
        "**Variance.** Share of the first components over all latents, and of the first one within single latents:",
        "",
        "| quantity | pc1 | pc2 | pc3 | pc1..5 | pc1 within latent 1.." + str(n) + " |",
        "|---|---|---|---|---|---|",
    ]
    for name in QUANTITIES:
        part = variance[variance["quantity"] == name]
        shares = part[part["latents"] == "all"]["share"].tolist()
        within = [
            part[(part["latents"] == str(k)) & (part["component"] == 1)]["share"].iloc[0] for k in range(1, n + 1)
        ]
        shown = [f"{share:.2f}" for share in (shares + [0.0] * 3)[:3]]
        lines.append(
            f"| {name} | {' | '.join(shown)} | {sum(shares[:5]):.2f} | {', '.join(f'{x:.2f}' for x in within)} |"
        )
    texts = ["\n".join(lines)]
    tokens = tables["token_alignment"]
    plain = tokens[(tokens["embedding"] == "plain") & (tokens["component"] <= 2)]
    texts.append(
        "**End of thought.** Cosine with its embedding: "
        + "; ".join(
            f"{row['quantity']} pc{row['component']}: {row['cosine']:+.2f} (rank {row['rank']} of "
            f"{row['tokens']} tokens)"
            for _, row in plain.iterrows()
        )
        + "."
    )
    aligned = tables["alignment"].groupby("quantity")[["first_two", "all_kept", "random_first_two"]].mean()
    texts.append(
        "**Steering directions.** Share of A−B (mean over pairs) in the first two components / in those kept (a random "
        "direction: first two): "
        + "; ".join(
            f"{name}: {row['first_two']:.2f} / {row['all_kept']:.2f} ({row['random_first_two']:.3f})"
            for name, row in aligned.iterrows()
        )
        + "."
    )
    parity = tables["parity"]
    texts.append(
        "**Even and odd.** Variance of the first two scores between them, against the best other division into equal "
        "groups (held-out prompts): "
        + "; ".join(
            f"{row['quantity']}: {row['share']:.2f} against {row['best_other']:.2f} (rank {row['rank']} of "
            f"{row['divisions']})"
            for _, row in parity.iterrows()
        )
        + "."
    )
    found = []
    for space in ("embedding", "kv"):
        base = tables["along_baseline"]
        random = tables["along_random"]
        part = base[base["condition"].str.startswith(space)]
        beyond = random[random["condition"].str.startswith(space)]
        worst = part.sort_values("difference").iloc[0] if len(part) else None
        text = f"{space}: {int((beyond['q'] < 0.05).sum())} of {len(beyond)} differ from random directions (q < 0.05)"
        if worst is not None:
            text += f"; largest change {worst['condition']} {interval(worst, 'difference')} points"
        found.append(text)
    texts.append("**Along components** (early exit): " + "; ".join(found) + ".")
    cells = tables["cells"]
    counts = []
    for edited, part in cells.groupby("space"):
        counts.append(
            f"{edited}: {int((part['verdict'] == 'improvement').sum())} better, "
            f"{int((part['verdict'] == 'harm').sum())} "
            f"worse of {len(part)} cells"
        )
    texts.append("**Grid** (early exit; against baseline and random directions, corrected): " + "; ".join(counts) + ".")
    texts.append(_where_words(tables))
    return texts


def _where_words(tables: dict[str, pd.DataFrame]) -> str:
    table = tables["where"].pivot(index="condition", columns="measure", values="mean")
    lines = [
        "**Where an edit goes** (mean differences at c = ±1; changes in units of the natural spread over prompts, KL "
        "in nats):",
        "",
        "| edit | size | in the slot | KL at once | z of next latent | slot of next latent | KL after one more | h_n "
        "| KL at the end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = ("edit_size", "slot", "kl", "z_next", "slot_next", "kl_next", "h_last", "kl_end")
    for name, _, _ in KINDS:
        for control in ("direction", "random"):
            row = table.loc[f"{name} {control}"]
            lines.append(f"| {name}, {control} | " + " | ".join(f"{row[m]:.3f}" for m in shown) + " |")
    contrasts = tables["where_contrasts"]
    kl, slot, after = (
        row_of(contrasts[contrasts["measure"] == measure], "kv direction", "embedding direction")
        for measure in ("kl", "slot", "kl_next")
    )
    slots = tables["where"][tables["where"]["measure"] == "slot"]
    ratio = row_of(slots, "kv direction")["mean"] / max(row_of(slots, "embedding direction")["mean"], 1e-9)
    lines += [
        "",
        f"KV minus embedding: KL at once {interval(kl, 'difference', 1, 3)} ({p_text(kl['p'])}); change of the slot "
        f"{interval(slot, 'difference', 1, 2)} spreads ({p_text(slot['p'])}), a ratio of {ratio:.1f}; KL after one "
        f"more latent {interval(after, 'difference', 1, 3)} ({p_text(after['p'])}).",
    ]
    if slot["lower"] > 0 and kl["lower"] > 0:
        reading = (
            "The numbers support a difference in dose: an embedding edit of one mean difference moves the cache slot "
            "less than a KV edit of one mean difference does, and the answer with it."
        )
    elif kl["lower"] > 0:
        reading = (
            "KV edits change the answer more although they do not move the slot more: dose does not explain the "
            "difference."
        )
    elif kl["upper"] < 0:
        reading = "Here embedding edits change the answer more than KV edits: the published contrast is not seen."
    else:
        reading = "Here the two do not differ in their effect on the answer: the published contrast is not seen."
    return "\n".join([*lines, "", reading])


def figures(tables: dict[str, pd.DataFrame], where: pd.DataFrame, n: int, depth: int) -> dict[str, Any]:
    """Figures by file name."""
    found: dict[str, Any] = {}
    figure, axes = new_figure(2, 3, height=2.3)
    scores = tables["scores"]
    for axis, name in zip(axes.flat, QUANTITIES, strict=True):
        part = scores[scores["quantity"] == name]
        for k in range(1, n + 1):
            points = part[part["latent"] == k]
            axis.scatter(
                points["first"], points["second"], s=9, alpha=0.7, linewidths=0, label=f"latent {k}",
                color=PALETTE[(k - 1) % len(PALETTE)], marker="o" if k % 2 else "^",
            )  # fmt: skip
        parity = tables["parity"].set_index("quantity").loc[name]
        axis.set_title(f"{name} (even/odd: rank {parity['rank']:.0f} of {parity['divisions']:.0f})")
        axis.set(xlabel="first component", ylabel="second component")
    legend(figure, axes)
    found["components"] = figure

    figure, axes = new_figure(1, 2, height=2.6)
    left, right = axes[0]
    for place, name in enumerate(QUANTITIES):
        part = tables["variance"]
        part = part[(part["quantity"] == name) & (part["latents"] == "all")]
        left.plot(part["component"], 100 * part["share"].cumsum(), color=PALETTE[place], marker="o", markersize=3,
                  linewidth=1, label=name)  # fmt: skip
    left.set(xlabel="components", ylabel="variance explained (%)", title="All latents together", ylim=(0, 102))
    left.legend(loc="best", ncols=2)
    changed = tables["grid_changed"].set_index("condition")
    place = 0
    for space in ("kv", "embedding", "hidden"):
        for control, line in (("direction", "-"), ("random", ":")):
            rows = changed.loc[[f"{space} early-exit {control} {k}" for k in range(1, n + 1)]]
            right.errorbar(
                np.arange(1, n + 1) + 0.06 * (place - 2), 100 * rows["mean"],
                yerr=100 * np.abs(np.stack([rows["mean"] - rows["lower"], rows["upper"] - rows["mean"]])),
                **look(place // 2, control == "random"), linestyle=line, markersize=3.5, linewidth=1, capsize=1.5,
                label=f"{space}, {'A−B' if control == 'direction' else control}",
            )  # fmt: skip
            place += 1
    right.set(xlabel="edited latent", ylabel="changed answers (%)", title="Steering, early exit, |c| 0.5 and 1",
              xticks=range(1, n + 1))  # fmt: skip
    from_zero(right)
    legend(figure, [right])
    found["variance-steering"] = figure

    figure, axes = new_figure(1, 3, height=2.6, width_ratios=[1, 1, 1.15])
    table = tables["where"]
    names = [name for name, _, _ in KINDS]
    for axis, measures, title in (
        (axes[0, 0], ("edit_size", "slot", "slot_next", "h_last"), "Change (spreads over prompts)"),
        (axes[0, 1], ("kl", "kl_next", "kl_end"), "KL of the answer (nats)"),
    ):
        short = {"edit_size": "edit", "slot": "slot k", "slot_next": "slot k+1", "h_last": "h of last",
                 "kl": "at once", "kl_next": "one more", "kl_end": "at the end"}  # fmt: skip
        for place, name in enumerate(names):
            rows = table[table["condition"] == f"{name} direction"].set_index("measure").loc[list(measures)]
            draw_series(axis, range(len(measures)), rows, name, place, scale=1)
        axis.set_xticks(range(len(measures)), [short[m] for m in measures], rotation=20, ha="right")
        axis.set_title(title)
        from_zero(axis)
    for place, name in enumerate(names):
        rows = table[table["condition"] == f"{name} direction"].set_index("measure")
        rows = rows.loc[[f"eot_{layer}" for layer in range(depth + 1)]]
        draw_series(axes[0, 2], range(depth + 1), rows, name, place, scale=1)
    axes[0, 2].set(xlabel="layer", title="Change at the end of thought (spreads)")
    axes[0, 2].xaxis.get_major_locator().set_params(integer=True)
    from_zero(axes[0, 2])
    legend(figure, axes)
    found["where"] = figure
    return found


def main(config: Config) -> None:
    """Load, run, print the summary."""
    model = load_model(config, attention="eager")
    split = load_prompts(config, model.protocol.question_suffix)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
