"""`codi early-exit`: answer after each latent; does the model know when it is done, and what would stopping save?

Every prompt is answered after 0, 1, .. n latents. With each answer comes its confidence: the probability that the model
gives to exactly this answer and the end of text after it. From these, without running anything again:

- agreement    is the answer after latent k the one after latent n already?
- calibration  is an answer of confidence p right in a share p of cases? Brier score (mean squared distance between
               confidence and truth), its skill against always saying the accuracy, expected calibration error over ten
               bins of equal width, and the area under the ROC curve.
- policies     fixed: stop after latent k. confidence: stop at the first latent whose confidence reaches a threshold,
               the one that costs the fewest latents on the *derivation* prompts while losing at most --allowed-loss
               there. stable: stop once an answer has come --patience + 1 times in a row. Control, "shuffled": the same
               stopping times dealt out to other prompts. Upper bound, "oracle": the first latent whose answer is the
               final one. Deciding costs an answer per latent; what is counted here is latents.

Runs as `codi early-exit` or `python -m experiments.latents.early_exit`. No published numbers, so --legacy only changes
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from codi.decode import decode_answers
from codi.forced import forced
from experiments.figures.style import CONTROL, FAINT, SERIES, legend
from experiments.latents.claims import number_claims
from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums, interval_of
from experiments.study.claims import ClaimsTable
from experiments.study.shared import (
    Result,
    StudyOptions,
    answer_table,
    compare,
    draw_series,
    interval,
    levels,
    load_model,
    load_prompts,
    new_figure,
    open_study,
    p_text,
    row_of,
    stderr,
)
from experiments.tasks import Problem
from experiments.tasks.split import Split
from steering.directions import generator

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Config", "calibration", "exits", "main", "policies", "run"]

BINS = 10


@dataclass(frozen=True)
class Config(StudyOptions):
    """Answer after each latent: agreement, calibration, latents saved."""

    out: Path = Path("runs/early-exit")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    task: str = "arithmetic"
    """Prompts: arithmetic, templates, a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id."""
    limit: int | None = 400
    """Number of evaluation prompts (a seeded choice); None: all."""
    derivation: int = 400
    """Prompts on which the threshold is chosen; they share no question and no numbers with the evaluation prompts."""
    allowed_loss: float = 0.01
    """Largest loss of accuracy, a fraction, that the threshold may cost on the derivation prompts."""
    patience: int = 1
    """Policy "stable": so many further latents must give the same answer."""
    draws: int = 20
    """Draws of the shuffled control."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.allowed_loss < 1:
            raise ValueError(f"allowed-loss must be in 0..1, got {self.allowed_loss}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


def exits(model: CodiModel, problems: Sequence[Problem], config: Config) -> pd.DataFrame:
    """Trial table of answers after every number of latents, conditions "0".."n", with `confidence` (a probability)."""
    parts = []
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i].question))
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        whole = model.rollout(model.encode([problems[i].question for i in rows]), model.n_latents, keep=("cache",))
        for k in range(model.n_latents + 1):
            thought = whole.truncate(k)
            answers = decode_answers(model, thought, config.max_new_tokens)
            logp, there, _, _ = forced(model, thought, answers.tokens)
            score = np.zeros(len(rows))
            for row, tokens in enumerate(answers.tokens):
                ids = [*tokens, model.protocol.eos_id] if answers.finished[row] else list(tokens)
                score[row] = sum(float(logp[row, place, token]) for place, token in enumerate(ids))
            assert bool(there.any(1).all())
            parts.append(
                answer_table(problems, rows, answers.texts, condition=str(k), latent=k, confidence=np.exp(score))
            )
    return pd.concat(parts, ignore_index=True)


def calibration(trials: pd.DataFrame, settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far confidence can be trusted, per number of latents.

    Args:
        trials: from `exits`.
        settings: resamples and seed.

    Returns:
        One row per number of latents: latent, n, n_clusters, accuracy, confidence (means), ece with ece_lower and
        ece_upper (95 %, bootstrap over clusters), brier, skill (1 - brier / brier of always saying the accuracy; 1 is
        perfect, 0 no use, NaN if all answers are right or all wrong), auroc (0.5: confidence does not tell right from
        wrong; NaN likewise). And the reliability table: latent, bin, confidence, accuracy, n.

    Source: expected calibration error, Naeini et al. 2015; Brier 1950.
    """
    rows, bins = [], []
    for latent, part in trials.groupby("latent", sort=True):
        codes, names = cluster_codes(part["cluster"])
        right, confidence = part["correct"].to_numpy(float), part["confidence"].to_numpy(float)
        place = np.minimum((confidence * BINS).astype(int), BINS - 1)
        gaps = np.eye(BINS)[place] * (right - confidence)[:, None]
        sums, counts = cluster_sums(gaps, codes, len(names))
        _, lower, upper = interval_of(
            _ece,
            np.vstack([sums, counts[:1]]),
            weights=settings.weights(len(names)),
            n_clusters=len(names),
            level=settings.level,
            bounds=(0.0, 1.0),
        )
        accuracy = right.mean()
        brier, always = ((confidence - right) ** 2).mean(), accuracy * (1 - accuracy)
        both = 0 < accuracy < 1
        rows.append(
            {
                "latent": latent,
                "n": len(part),
                "n_clusters": len(names),
                "accuracy": accuracy,
                "confidence": confidence.mean(),
                "ece": float(_ece(np.append(gaps.sum(0), len(part)))),
                "ece_lower": lower[0],
                "ece_upper": upper[0],
                "brier": brier,
                "skill": 1 - brier / always if both else np.nan,
                "auroc": roc_auc_score(right, confidence) if both else np.nan,
            }
        )
        for number in range(BINS):
            here = place == number
            if here.any():
                bins.append(
                    {
                        "latent": latent,
                        "bin": number,
                        "confidence": confidence[here].mean(),
                        "accuracy": right[here].mean(),
                        "n": int(here.sum()),
                    }
                )
    return pd.DataFrame(rows), pd.DataFrame(bins)


def _ece(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error: sum over bins of |right - confidence|, weighted by what is in the bin.

    Args:
        sums: (…, bin then prompts): sum of (right - confidence) over the prompts of each bin, and number of prompts.
    """
    return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]


def _wide(trials: pd.DataFrame, value: str) -> np.ndarray:
    """(prompt, latent 0..n), prompts in the order of prompt_id."""
    return trials.pivot(index="prompt_id", columns="latent", values=value).to_numpy()


def stops_at(trials: pd.DataFrame, threshold: float) -> np.ndarray:
    """(prompt,) the first number of latents whose confidence reaches the threshold; the last one if none does."""
    reached = _wide(trials, "confidence").astype(float) >= threshold
    reached[:, -1] = True
    return reached.argmax(1)


def chosen_threshold(trials: pd.DataFrame, allowed_loss: float) -> float:
    """The threshold of fewest latents whose accuracy on these prompts is at most `allowed_loss` below the full one."""
    right, confidence = _wide(trials, "correct").astype(float), _wide(trials, "confidence").astype(float)
    least = right[:, -1].mean() - allowed_loss
    best, cost = np.inf, float(right.shape[1] - 1)
    for threshold in np.unique(np.concatenate([[0.0], np.quantile(confidence, np.linspace(0, 1, 201))])):
        stop = stops_at(trials, float(threshold))
        if right[np.arange(len(right)), stop].mean() >= least and stop.mean() < cost:
            best, cost = float(threshold), float(stop.mean())
    return best


def policies(trials: pd.DataFrame, derivation: pd.DataFrame, config: Config) -> tuple[pd.DataFrame, float]:
    """Trial table of every policy, with `latents` used; and the threshold of the policy "confidence"."""
    n = int(trials["latent"].max())
    threshold = chosen_threshold(derivation, config.allowed_loss)
    prediction = pd.DataFrame(_wide(trials, "text"))
    texts = prediction.to_numpy()
    same = texts == texts[:, -1:]
    stable = np.full(len(texts), n)
    for k in range(n, config.patience - 1, -1):
        repeated = np.all([texts[:, k] == texts[:, k - back] for back in range(1, config.patience + 1)], axis=0)
        stable[repeated] = k
    confident = stops_at(trials, threshold)
    stops: list[tuple[str, int, np.ndarray]] = [(f"fixed {k}", 0, np.full(len(texts), k)) for k in range(n + 1)]
    stops += [("confidence", 0, confident), ("stable", 0, stable), ("oracle", 0, same.argmax(1))]
    for draw in range(config.draws):
        order = generator(config.seed, "early-exit", draw).permutation(len(texts))
        stops += [("confidence, shuffled", draw, confident[order]), ("stable, shuffled", draw, stable[order])]
    first = trials[trials["latent"] == n].sort_values("prompt_id")
    right = _wide(trials, "correct").astype(bool)
    frames = [
        first[["prompt_id", "cluster"]].assign(
            condition=name, draw=draw, latents=stop, correct=right[np.arange(len(stop)), stop]
        )
        for name, draw, stop in stops
    ]
    return pd.concat(frames, ignore_index=True), threshold


def run(config: Config, model: CodiModel, split: Split, say: Callable[[str], None] | None = None) -> Result:
    """The study on a loaded model: trials, tables, figures, claims and summary in the run folder."""
    n, settings = model.n_latents, config.settings
    with open_study("early-exit", config, model, split, say) as study:
        trials = study.part("exits", lambda: exits(model, split.evaluation, config))
        other = study.part("derivation", lambda: exits(model, split.derivation, config))
        final = trials[trials["latent"] == n].set_index("prompt_id")["text"]
        trials["agrees"] = trials["text"] == trials["prompt_id"].map(final)
        tables = {"exits": levels(trials, settings=settings), "agreement": levels(trials, "agrees", settings)}
        steps = [(str(k), str(k - 1)) for k in range(1, n + 1)]
        tables["steps"] = compare(trials, steps, settings=settings)
        tables["calibration"], tables["reliability"] = calibration(trials, settings)
        stopped, threshold = policies(trials, other, config)
        contrasts = [(name, f"fixed {n}") for name in stopped["condition"].unique() if name != f"fixed {n}"]
        contrasts += [("confidence", "confidence, shuffled"), ("stable", "stable, shuffled")]
        tables["policies"] = compare(stopped, contrasts, settings=settings)
        used = levels(stopped, "latents", settings).set_index("condition")
        tables["cost"] = used.reset_index()
        for name, table in tables.items():
            study.table(name, table)
        study.draw(lambda: figures(tables, trials, stopped, n))
        claims = ClaimsTable(number_claims(lambda k: row_of(tables["steps"], str(k), str(k - 1)), n))
        text = study.finish(f"Early exit: {model.name}", words(tables, n, threshold, config), claims)
        return Result(study.path, tables, claims, text)


def words(tables: dict[str, pd.DataFrame], n: int, threshold: float, config: Config) -> list[str]:
    """The summary, paragraph by paragraph."""
    exit_, agreement, steps = (tables[name] for name in ("exits", "agreement", "steps"))
    final = row_of(exit_, str(n))
    calibrated = tables["calibration"].set_index("latent")
    lines = [
        f"{int(final['n'])} prompts of {config.asked} in {int(final['n_clusters'])} clusters; per cent, 95 % intervals "
        "over clusters. Gain: against one latent fewer (* q < 0.05).",
        "",
        "| latents | accuracy | gain | same answer as in the end | confidence | ECE | Brier skill | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k in range(n + 1):
        row = calibrated.loc[k]
        gain = ""
        if k > 0:
            step = row_of(steps, str(k))
            gain = interval(step, "difference") + ("*" if step["q"] < 0.05 else "")
        lines.append(
            f"| {k} | {interval(row_of(exit_, str(k)))} | {gain} | {interval(row_of(agreement, str(k)))} | "
            f"{row['confidence']:.2f} | {row['ece']:.3f} [{row['ece_lower']:.3f}, {row['ece_upper']:.3f}] | "
            f"{row['skill']:.2f} | {row['auroc']:.2f} |"
        )
    texts = ["\n".join(lines)]
    policy, cost = tables["policies"], tables["cost"]
    found = []
    for name in ("confidence", "stable", "oracle"):
        change = row_of(policy, name, f"fixed {n}")
        found.append(
            f"{name}: {n - row_of(cost, name)['mean']:.2f} of {n} latents saved at "
            f"{interval(change, 'difference')} points of "
            f"accuracy ({p_text(change['p'])})"
        )
    texts.append(f"**Policies** (threshold {threshold:.3f} from the derivation prompts). " + "; ".join(found) + ".")
    control = []
    for name in ("confidence", "stable"):
        change = row_of(policy, name, f"{name}, shuffled")
        control.append(f"{name} {interval(change, 'difference')} points ({p_text(change['p'])})")
    texts.append(
        "**Is it the prompt that decides?** Against the same stopping times dealt out to other prompts: "
        + "; ".join(control)
        + "."
    )
    return texts


def figures(tables: dict[str, pd.DataFrame], trials: pd.DataFrame, stopped: pd.DataFrame, n: int) -> dict[str, Any]:
    """Figures by file name."""
    figure, axes = new_figure(1, 3, height=2.6)
    left, middle, right = axes[0]
    ks = list(range(n + 1))
    for place, (name, label) in enumerate((("exits", "right"), ("agreement", "same as in the end"))):
        rows = tables[name].set_index("condition").loc[[str(k) for k in ks]].reset_index()
        draw_series(left, ks, rows, label, place)
    left.set(
        xlabel="number of latents", ylabel="prompts (%)", title="Answer after each latent", xticks=ks, ylim=(-3, 103)
    )
    left.legend(loc="best")
    middle.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
    for place, k in enumerate(sorted({0, n // 2, n})):
        part = tables["reliability"][tables["reliability"]["latent"] == k]
        middle.plot(part["confidence"], part["accuracy"], color=SERIES[place], linewidth=0.9, label=f"{k} latents")
        middle.scatter(
            part["confidence"], part["accuracy"], s=4 + 60 * part["n"] / part["n"].sum(), color=SERIES[place]
        )
    middle.set(xlabel="confidence", ylabel="right (fraction)", title="Calibration")
    middle.set(xlim=(-0.02, 1.04), ylim=(-0.03, 1.05))
    middle.legend(loc="upper left")
    cost = tables["cost"].set_index("condition")["mean"]
    accuracy = stopped.groupby("condition")["correct"].mean()
    fixed = [f"fixed {k}" for k in ks]
    right.plot(cost[fixed], 100 * accuracy[fixed], color=CONTROL, marker="o", markersize=3, linewidth=1, label="fixed")
    curve = []
    truth = _wide(trials, "correct").astype(float)
    for threshold in np.linspace(0, 1.0001, 101):
        stop = stops_at(trials, float(threshold))
        curve.append((stop.mean(), 100 * truth[np.arange(len(stop)), stop].mean()))
    right.plot(*np.array(curve).T, color=SERIES[0], linewidth=1, label="confidence, any threshold")
    names = ("confidence", "confidence, shuffled", "stable", "stable, shuffled", "oracle")
    labels = ("confidence, chosen", "confidence, times shuffled", "stable", "stable, times shuffled", "oracle")
    looks = (("o", 0, True), ("o", 0, False), ("^", 1, True), ("^", 1, False), ("*", 2, True))
    for name, label, (marker, colour, filled) in zip(names, labels, looks, strict=True):
        right.plot(
            cost[name],
            100 * accuracy[name],
            marker,
            color=SERIES[colour],
            markersize=6,
            markerfacecolor=SERIES[colour] if filled else "white",
            label=label,
        )
    right.set(xlabel="mean number of latents", ylabel="accuracy (%)", title="What stopping early costs")
    legend(figure, [right], 4)
    return {"early-exit": figure}


def main(config: Config) -> None:
    """Load, run, print the summary."""
    model = load_model(config)
    split = load_prompts(config, model.protocol.question_suffix)
    print(run(config, model, split, stderr).text)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
