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

Trials: `exits` and, for the threshold, `derivation` (n_latents, confidence). Runs as `codi early-exit` or
`python -m experiments.latents.early_exit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from codi.decode import decode_answers
from codi.forced import forced
from experiments.figures.series import draw_series
from experiments.figures.style import CONTROL, FAINT, SERIES, legend, new_figure, number_text
from experiments.latents.claims import STAR, number_questions, sizes_table
from experiments.latents.options import EarlyExitOptions
from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums, interval_of
from experiments.statistics.effects import Selector, compare, differences, levels, row_of, rows_of, weighed
from experiments.statistics.words import interval, p_text, visible
from experiments.study.answers import answer_table, trial_schema
from experiments.study.claims import ClaimsTable
from experiments.study.limits import limits
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.study.verdicts import judged_together
from experiments.tasks.split import Split
from steering.directions import generator

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "calibration", "chosen_threshold", "exits", "main", "policies", "run", "stops_at"]

BINS = 10

EXITS = trial_schema(n_latents=pa.int16(), confidence=pa.float64())
"""Answers after n_latents latents, 0..n; confidence is a probability."""
COUNT = ("n_latents",)
POLICY = ("policy", "n_latents", "shuffled")
"""policy: fixed (n_latents says where it stops; elsewhere -1), confidence, stable or oracle."""


def after(k: int) -> Selector:
    """Answers after k latents."""
    return {"n_latents": k}


def fixed(k: int) -> Selector:
    """Everybody stops after k latents."""
    return {"policy": "fixed", "n_latents": k, "shuffled": False}


def policy(name: str, shuffled: bool = False) -> Selector:
    """A policy that decides prompt by prompt, or its control."""
    return {"policy": name, "n_latents": -1, "shuffled": shuffled}


# --- Plan and parts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    n_latents: int
    allowed_loss: float
    patience: int
    draws: int
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings
    asked: str


def make_plan(options: EarlyExitOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for."""
    return Plan(
        n_latents=model.n_latents,
        allowed_loss=options.allowed_loss,
        patience=options.patience,
        draws=options.draws,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=options.statistics(options.seed),
        asked=options.asked,
    )


def parts(plan: Plan) -> list[Part]:
    """The same answers of both sets of prompts."""
    how = {"batch_size": plan.batch_size, "max_new_tokens": plan.max_new_tokens}
    return [
        Part("exits", exits, {"side": "evaluation", **how}, plan.seed, EXITS),
        Part("derivation", exits, {"side": "derivation", **how}, plan.seed, EXITS),
    ]


def exits(
    bench: Workbench,
    *,
    side: Literal["evaluation", "derivation"],
    batch_size: int,
    max_new_tokens: int | None,
    seed: int,
) -> pd.DataFrame:
    """Answers after every number of latents, with their confidence."""
    model = bench.model
    problems = bench.prompts.evaluation if side == "evaluation" else bench.prompts.derivation
    found = []
    order = sorted(range(len(problems)), key=lambda i: -len(problems[i].question))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        whole = model.rollout(model.encode([problems[i].question for i in rows]), model.n_latents, keep=("cache",))
        for k in range(model.n_latents + 1):
            thought = whole.truncate(k)
            answers = decode_answers(model, thought, max_new_tokens)
            logp, there, _, _ = forced(model, thought, answers.tokens)
            score = np.zeros(len(rows))
            for row, tokens in enumerate(answers.tokens):
                ids = [*tokens, model.protocol.eos_id] if answers.finished[row] else list(tokens)
                score[row] = sum(float(logp[row, place, token]) for place, token in enumerate(ids))
            assert bool(there.any(1).all())
            found.append(answer_table(problems, rows, answers.texts, n_latents=k, confidence=np.exp(score)))
    return pd.concat(found, ignore_index=True)


# --- Calibration ------------------------------------------------------------------------------------------------------


def calibration(trials: pd.DataFrame, settings: Settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How far confidence can be trusted, per number of latents.

    Args:
        trials: from `exits`.
        settings: resamples and seed.

    Returns:
        One row per number of latents: n_latents, n, n_clusters, accuracy, confidence (means), ece with ece_lower and
        ece_upper (bootstrap over clusters), brier, skill (1 - brier / brier of always saying the accuracy; 1 is
        perfect, 0 no use, NaN if all answers are right or all wrong), auroc (0.5: confidence does not tell right from
        wrong; NaN likewise). And the reliability table: n_latents, bin, confidence, accuracy, n.

    Source: expected calibration error, Naeini et al. 2015; Brier 1950.
    """
    rows, bins = [], []
    for number, part in trials.groupby("n_latents", sort=True):
        right, confidence = part["correct"].to_numpy(float), part["confidence"].to_numpy(float)
        place = np.minimum((confidence * BINS).astype(int), BINS - 1)
        accuracy = right.mean()
        brier, always = ((confidence - right) ** 2).mean(), accuracy * (1 - accuracy)
        both = 0 < accuracy < 1
        error = _ece_row(np.eye(BINS)[place] * (right - confidence)[:, None], part["cluster"], settings)
        rows.append(
            {"n_latents": number, "n": len(part), "accuracy": accuracy, "confidence": confidence.mean()}
            | error
            | {
                "brier": brier,
                "skill": 1 - brier / always if both else np.nan,
                "auroc": roc_auc_score(right, confidence) if both else np.nan,
            }
        )
        for one in np.unique(place):
            here = place == one
            means = {"confidence": confidence[here].mean(), "accuracy": right[here].mean()}
            bins.append({"n_latents": number, "bin": one, **means, "n": int(here.sum())})
    names = ["n_latents", "n", "n_clusters", "accuracy", "confidence"]
    table = pd.DataFrame(rows)
    return table[[*names, *(name for name in table if name not in names)]], pd.DataFrame(bins)


def _ece_row(gaps: np.ndarray, clusters: pd.Series, settings: Settings) -> dict[str, Any]:
    """Expected calibration error with its interval, from (prompt, bin) values of right - confidence."""
    codes, names = cluster_codes(clusters)
    sums, counts = cluster_sums(gaps, codes, len(names))
    _, lower, upper = interval_of(
        _ece,
        np.vstack([sums, counts[:1]]),
        weights=settings.weights(len(names)),
        n_clusters=len(names),
        level=settings.level,
        bounds=(0.0, 1.0),
    )
    error = float(_ece(np.append(gaps.sum(0), len(gaps))))
    return {"n_clusters": len(names), "ece": error, "ece_lower": lower[0], "ece_upper": upper[0]}


def _ece(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error: sum over bins of |right - confidence|, weighted by what is in the bin.

    Args:
        sums: (…, bin then prompts): sum of (right - confidence) over the prompts of each bin, and number of prompts.
    """
    return np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]


# --- Policies ---------------------------------------------------------------------------------------------------------


def _wide(trials: pd.DataFrame, value: str) -> np.ndarray:
    """(prompt, latents 0..n), prompts in the order of prompt_id."""
    return trials.pivot(index="prompt_id", columns="n_latents", values=value).to_numpy()


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


def policies(
    trials: pd.DataFrame, derivation: pd.DataFrame, *, allowed_loss: float, patience: int, draws: int, seed: int
) -> tuple[pd.DataFrame, float]:
    """What becomes of every prompt under every policy.

    Args:
        trials: from `exits`.
        derivation: the same of the prompts on which the threshold of the policy "confidence" is chosen.
        allowed_loss: see `chosen_threshold`.
        patience: of the policy "stable".
        draws: of the shuffled controls.
        seed: of the shuffles.

    Returns:
        prompt_id, cluster, the columns POLICY, draw (-1: not drawn), latents (used), correct; and the threshold.
    """
    n = int(trials["n_latents"].max())
    threshold = chosen_threshold(derivation, allowed_loss)
    texts = _wide(trials, "text")
    same = texts == texts[:, -1:]
    stable = np.full(len(texts), n)
    for k in range(n, patience - 1, -1):
        repeated = np.all([texts[:, k] == texts[:, k - back] for back in range(1, patience + 1)], axis=0)
        stable[repeated] = k
    confident = stops_at(trials, threshold)
    stops: list[tuple[Selector, int, np.ndarray]] = [(fixed(k), -1, np.full(len(texts), k)) for k in range(n + 1)]
    stops += [(policy("confidence"), -1, confident), (policy("stable"), -1, stable)]
    stops += [(policy("oracle"), -1, same.argmax(1))]
    for draw in range(draws):
        order = generator(seed, "early-exit", draw).permutation(len(texts))
        stops += [(policy("confidence", True), draw, confident[order]), (policy("stable", True), draw, stable[order])]
    first = trials[trials["n_latents"] == n].sort_values("prompt_id")
    right = _wide(trials, "correct").astype(bool)
    frames = [
        first[["prompt_id", "cluster"]].assign(
            **chosen, draw=draw, latents=stop, correct=right[np.arange(len(stop)), stop]
        )
        for chosen, draw, stop in stops
    ]
    return pd.concat(frames, ignore_index=True), threshold


# --- What they say ----------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    n, settings = plan.n_latents, plan.settings
    answers = trials["exits"]
    final = answers[answers["n_latents"] == n].set_index("prompt_id")["text"]
    answers = answers.assign(agrees=answers["text"] == answers["prompt_id"].map(final))
    stopped, threshold = policies(
        answers, trials["derivation"], allowed_loss=plan.allowed_loss, patience=plan.patience, draws=plan.draws,
        seed=plan.seed,
    )  # fmt: skip
    reliable = calibration(answers, settings)
    deciding = [policy(name) for name in ("confidence", "stable", "oracle")]
    controls = [policy(name, shuffled=True) for name in ("confidence", "stable")]
    contrasts = [(one, fixed(n)) for one in (*(fixed(k) for k in range(n)), *deciding, *controls)]
    contrasts += list(zip(deciding[:2], controls, strict=True))
    steps = [(after(k), after(k - 1)) for k in range(1, n + 1)]
    gains, size = weighed(answers, steps, COUNT, settings=settings)
    tables = {
        "exits": levels(answers, COUNT, settings=settings),
        "agreement": levels(answers, COUNT, "agrees", settings),
        "steps": gains,
        "calibration": reliable[0],
        "reliability": reliable[1],
        "policies": compare(stopped, contrasts, POLICY, settings=settings),
        "cost": levels(stopped, POLICY, "latents", settings, (0, n)),
        "sizes": sizes_table({"steps": size}),
    }
    change = differences(answers, steps, COUNT)
    questions = number_questions(
        lambda k: change[k - 1].to_numpy(), lambda k: row_of(tables["exits"], after(k))["mean"], n
    )
    claims = ClaimsTable(judged_together(questions, change.index.get_level_values("cluster").to_numpy(), settings))
    seen = limits(answers[answers["n_latents"] == n], len(contrasts), settings)
    caption = (
        "Answers after each number of latents; how far confidence can be trusted (size of a point: answers in the "
        f"bin); accuracy against latents used. {100 * settings.level:g} % intervals over clusters."
    )
    return Findings(
        words(plan, tables, threshold, seen),
        tables,
        lambda: figures(tables, answers, stopped, n),
        {"early-exit": caption},
        claims,
    )


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], threshold: float, seen: str) -> list[Section]:
    """The summary, section by section; `seen` says what the run can see, and policies could lose or gain."""
    n, cost = plan.n_latents, tables["cost"]
    found = []
    for name in ("confidence", "stable", "oracle"):
        change = row_of(tables["policies"], policy(name), fixed(n))
        found.append(
            f"{name}: {n - row_of(cost, policy(name))['mean']:.2f} of {n} latents saved at "
            f"{interval(change, 'difference')} points of accuracy ({p_text(change['p'])}; {visible(change)} points "
            "could have been told from none)"
        )
    control = []
    for name in ("confidence", "stable"):
        change = row_of(tables["policies"], policy(name), policy(name, shuffled=True))
        control.append(f"{name} {interval(change, 'difference')} points ({p_text(change['p'])})")
    return [
        Section(_by_latents(plan, tables, seen)),
        Section(f"Threshold {threshold:.3f} from the derivation prompts. {'; '.join(found)}.", "Policies"),
        Section(
            "Against the same stopping times dealt out to other prompts: " + "; ".join(control) + ".",
            "Is it the prompt that decides?",
        ),
    ]


def _by_latents(plan: Plan, tables: Mapping[str, pd.DataFrame], seen: str) -> str:
    """Accuracy, gain, agreement and calibration after each number of latents."""
    final, size = row_of(tables["exits"], after(plan.n_latents)), row_of(tables["sizes"], {"table": "steps"})
    lines = [
        f"{int(final['n'])} prompts of {plan.asked} in {int(final['n_clusters'])} clusters; per cent, "
        f"{100 * plan.settings.level:g} % intervals over clusters. Gain: against one latent fewer ({STAR}, "
        f"{100 * size['size']:.1f} points: {size['words']}). {seen}".strip(),
        "",
        "| latents | accuracy | gain | same answer as in the end | confidence | ECE | Brier skill | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k in range(plan.n_latents + 1):
        row = row_of(tables["calibration"], after(k))
        gain = ""
        if k > 0:
            step = row_of(tables["steps"], after(k))
            gain = interval(step, "difference") + ("*" if step["matters"] else "")
        shares = [interval(row_of(tables[name], after(k))) for name in ("exits", "agreement")]
        lines.append(
            f"| {k} | {shares[0]} | {gain} | {shares[1]} | "
            f"{row['confidence']:.2f} | {row['ece']:.3f} [{row['ece_lower']:.3f}, {row['ece_upper']:.3f}] | "
            f"{number_text(row['skill'])} | {number_text(row['auroc'])} |"
        )
    return "\n".join(lines)


# --- Figures ----------------------------------------------------------------------------------------------------------


def figures(tables: Mapping[str, pd.DataFrame], trials: pd.DataFrame, stopped: pd.DataFrame, n: int) -> dict[str, Any]:
    """Figures by file name."""
    figure, axes = new_figure(1, 3, height=2.6)
    left, middle, right = axes[0]
    ks = list(range(n + 1))
    for place, (name, label) in enumerate((("exits", "right"), ("agreement", "same as in the end"))):
        draw_series(left, ks, rows_of(tables[name], [after(k) for k in ks]), label, place)
    left.set(
        xlabel="number of latents", ylabel="prompts (%)", title="Answer after each latent", xticks=ks, ylim=(-3, 103)
    )
    left.legend(loc="best")
    middle.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8, linestyle=":")
    for place, k in enumerate(sorted({0, n // 2, n})):
        part = tables["reliability"][tables["reliability"]["n_latents"] == k]
        middle.plot(part["confidence"], part["accuracy"], color=SERIES[place], linewidth=0.9, label=f"{k} latents")
        middle.scatter(
            part["confidence"], part["accuracy"], s=4 + 60 * part["n"] / part["n"].sum(), color=SERIES[place]
        )
    middle.set(xlabel="confidence", ylabel="right (fraction)", title="Calibration")
    middle.set(xlim=(-0.02, 1.04), ylim=(-0.03, 1.05))
    middle.legend(loc="upper left")
    _draw_costs(right, tables["cost"], trials, stopped, n)
    legend(figure, [right], 4)
    return {"early-exit": figure}


def _draw_costs(axis: Any, cost: pd.DataFrame, trials: pd.DataFrame, stopped: pd.DataFrame, n: int) -> None:
    """Accuracy against latents used: every policy, its control, and the confidence policy at any threshold."""
    truth = _wide(trials, "correct").astype(float)
    accuracy = stopped.groupby([*POLICY])["correct"].mean().reset_index()

    def point(chosen: Selector) -> tuple[float, float]:
        return row_of(cost, chosen)["mean"], 100 * row_of(accuracy, chosen)["correct"]

    x, y = zip(*(point(fixed(k)) for k in range(n + 1)), strict=True)
    axis.plot(x, y, color=CONTROL, marker="o", markersize=3, linewidth=1, label="fixed")
    curve = []
    for threshold in np.linspace(0, 1.0001, 101):
        stop = stops_at(trials, float(threshold))
        curve.append((stop.mean(), 100 * truth[np.arange(len(stop)), stop].mean()))
    axis.plot(*np.array(curve).T, color=SERIES[0], linewidth=1, label="confidence, any threshold")
    for name, shuffled, label, marker, colour in (
        ("confidence", False, "confidence, chosen", "o", 0),
        ("confidence", True, "confidence, times shuffled", "o", 0),
        ("stable", False, "stable", "^", 1),
        ("stable", True, "stable, times shuffled", "^", 1),
        ("oracle", False, "oracle", "*", 2),
    ):
        face = "white" if shuffled else SERIES[colour]
        x_y = ([value] for value in point(policy(name, shuffled)))
        axis.plot(*x_y, marker, color=SERIES[colour], markersize=6, markerfacecolor=face, label=label)
    axis.set(xlabel="mean number of latents", ylabel="accuracy (%)", title="What stopping early costs")


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=EarlyExitOptions,
    title="Early exit",
    prompts=lambda options, model: options.load_split(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
