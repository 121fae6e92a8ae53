"""`codi lens detect`: are intermediate values and answers among the most probable tokens? beside a chance level.

Trials: `readings`, `states`, `words` and `values`, see detection.py; all four come from one pass over the prompts.
Knows nothing about how a value is spelled (spellings.py), looked for (reading.py) or counted (rates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from scipy.stats import spearmanr

from codi import CodiModel
from experiments.lens import rates as tables_of
from experiments.lens.detection import READINGS, STATES, VALUES, WORDS, Detection
from experiments.lens.options import DetectOptions, Rule
from experiments.lens.prompts import per_cent, printed, sizes, span
from experiments.lens.reading import detect, shared_positions
from experiments.lens.saved import lenses_of, load_lens, reading_identity
from experiments.statistics.clusters import Settings
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.tasks.split import Split
from lenses.latent_lens import slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STUDY", "Plan", "main", "run"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        trained: (value, training questions with this answer, with it as an earlier step) of the lenses that are read.
    """

    lenses: tuple[str, ...]
    folder: str
    rule: Rule
    donors: int
    words: tuple[str, ...]
    k: int
    batch_size: int
    seed: int
    settings: Settings
    trained: tuple[tuple[float, int, int], ...]


def make_plan(options: DetectOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: lenses that are not there, for another model or without a common position; too few prompts.
    """
    shared_positions(model, load_lens(options.read, options.lens, model), prompts.evaluation)
    file = options.lens / "training_values.csv"
    trained = pd.read_csv(file).itertuples(index=False) if file.is_file() else ()
    return Plan(
        lenses=options.read,
        folder=str(options.lens),
        rule=options.numbers,
        donors=options.donors,
        words=options.words,
        k=options.k,
        batch_size=options.batch_size,
        seed=options.seed,
        settings=options.statistics(options.seed),
        trained=tuple((float(value), int(answer), int(step)) for value, answer, step in trained),
    )


# --- Parts ------------------------------------------------------------------------------------------------------------


def parts(plan: Plan) -> list[Part]:
    """One part per trial table."""
    arguments = {
        "lenses": plan.lenses, "folder": plan.folder, "rule": plan.rule, "donors": plan.donors, "words": plan.words,
        "k": plan.k, "batch_size": plan.batch_size,
    }  # fmt: skip
    found = [
        Part("readings", readings, arguments, plan.seed, READINGS),
        Part("states", states, arguments, plan.seed, STATES),
        Part("values", values, arguments, plan.seed, VALUES),
    ]
    return [*found, Part("words", words, arguments, plan.seed, WORDS)] if plan.words else found


def readings(bench: Workbench, *, seed: int, **arguments: Any) -> pd.DataFrame:
    """The table `readings`."""
    return bench.once(seen, seed=seed, **arguments).readings()


def states(bench: Workbench, *, seed: int, **arguments: Any) -> pd.DataFrame:
    """The table `states`."""
    return bench.once(seen, seed=seed, **arguments).states()


def values(bench: Workbench, *, seed: int, **arguments: Any) -> pd.DataFrame:
    """The table `values`."""
    return bench.once(seen, seed=seed, **arguments).value_readings()


def words(bench: Workbench, *, seed: int, **arguments: Any) -> pd.DataFrame:
    """The table `words`."""
    return bench.once(seen, seed=seed, **arguments).word_readings()


def seen(
    bench: Workbench,
    lenses: tuple[str, ...],
    folder: str,
    rule: Rule,
    donors: int,
    words: tuple[str, ...],
    k: int,
    batch_size: int,
    seed: int,
) -> Detection:
    """Everything that the lenses read on the evaluation prompts."""
    problems = bench.prompts.evaluation
    with bench.bar(len(problems), "prompt", "reading") as advance:
        return detect(
            bench.model,
            bench.once(lenses_of, lenses, folder),
            problems,
            rule=rule,
            donors=donors,
            words=words,
            frequency_k=k,
            batch_size=batch_size,
            seed=seed,
            advance=advance,
        )


# --- Findings ---------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    found = Detection.from_tables(trials)
    tables = {
        "rates": tables_of.rates(found, plan.settings),
        "entropy": tables_of.summaries(found, plan.settings),
    }
    if plan.words:
        tables["words"] = tables_of.word_rates(found, plan.settings)
    tables["answers"] = tables_of.answers(found, {value: (answer, step) for value, answer, step in plan.trained})
    claims = tables_of.claims_of(found, plan.settings)
    return Findings(
        [Section(text_of(plan, found, tables), form="plain")],
        tables,
        lambda: figures(plan, found, tables),
        captions(plan, found),
        claims if len(claims) else None,
        {"readings.parquet": tables_of.readings_of_targets(trials["readings"]).to_parquet(index=False)},
    )


def text_of(plan: Plan, found: Detection, tables: Mapping[str, pd.DataFrame]) -> str:
    """What the command prints."""
    rates = tables["rates"]
    several = rates.loc[rates["target"] == "answer", "multi_token"].iloc[0]
    lines = [
        f"{sizes(len(found.right), len(set(found.clusters)))}; {found.right.mean():.3f} answered right; numbers of "
        f"several tokens: rule {plan.rule!r} ({100 * several:.0f} % of the answers)",
        f"share of prompts with the value in the top {plan.k} [{per_cent(plan.settings.level)} over clusters], chance "
        "level behind it:",
        *_rate_lines(plan, found, rates),
        *_word_lines(plan, found, tables),
        *(_frequency_lines(found, tables["answers"]) if plan.trained else []),
    ]
    return "\n".join(lines)


def _rate_lines(plan: Plan, found: Detection, rates: pd.DataFrame) -> list[str]:
    """Rates at the last layer, and their mean over the layers below it."""
    shown = found.targets if len(found.targets) <= 5 else ("steps", "answer", "question")
    shown = tuple(
        target for target in shown if target in found.targets and not (target == "steps" and "step2" in shown)
    )
    width, n = max(map(len, shown)), found.n_layers
    here = rates[(rates["answered"] == "all") & (rates["k"] == plan.k)]
    last = here[(here["lens"] == found.lenses[0]) & (here["layer"] == n)]
    lines = [f"  last layer (every lens is the model there), positions {', '.join(map(str, found.positions))}:"]
    for target in shown:
        rows = last[last["target"] == target].to_dict(orient="records")
        cells = [f"{span(r['rate'], r['lower'], r['upper'], 2)} ({r['chance']:.2f})" for r in rows]
        lines.append(f"    {target:<{width}}  " + "  ".join(cells))
    inner = here[here["layer"] < n].groupby(["lens", "target", "latent"], as_index=False)[["rate", "chance"]].mean()
    for lens in found.lenses:
        lines.append(f"  lens {lens}, mean over layers 0..{n - 1}:")
        for target in shown:
            rows = inner[(inner["lens"] == lens) & (inner["target"] == target)].to_dict(orient="records")
            cells = [f"{r['rate']:.2f} ({r['chance']:.2f})" for r in rows]
            lines.append(f"    {target:<{width}}  " + "  ".join(cells))
    return lines


def _word_lines(plan: Plan, found: Detection, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Where each word family is read most."""
    lines = []
    for word in found.words:
        words = tables["words"]
        here = words[(words["word"] == word) & (words["k"] == plan.k)]
        forms = int(here["single_token_spellings"].iloc[0])
        if forms == 0 and here["rate"].max() == 0:
            lines.append(f"“{word}”: never read; no spelling of it is a single token of this vocabulary")
            continue
        best = here.iloc[int(here["rate"].to_numpy().argmax())]
        lines.append(
            f"“{word}” ({forms} of its spellings are single tokens): at most "
            f"{span(best['rate'], best['lower'], best['upper'])} (lens {best['lens']}, latent {best['latent']}, "
            f"layer {best['layer']}), see words.csv"
        )
    return lines


def _frequency_lines(found: Detection, answers: pd.DataFrame) -> list[str]:
    """Are answers read where they are not true, because the lens saw them often in training?"""
    lines = []
    for lens in found.lenses:
        mine = answers[(answers["lens"] == lens) & (answers["n_not"] > 0)]
        frequency = mine["trained_answers"] + mine["trained_steps"]
        if len(mine) < 3 or frequency.nunique() < 2 or mine["read_when_not"].nunique() < 2:
            continue
        rho = spearmanr(frequency, mine["read_when_not"]).statistic
        lines.append(
            f"{lens}: {len(mine)} answer values; read where true {mine['read_when_true'].mean():.3f}, where not "
            f"{mine['read_when_not'].mean():.3f} (mean share of latents × layers); rank correlation of the latter "
            f"with the value's frequency in the lens's training questions {rho:+.2f}"
        )
    return lines


# --- Figures ----------------------------------------------------------------------------------------------------------


def _drawn(found: Detection) -> list[str]:
    """Targets that get a column of panels: at most four."""
    targets = [t for t in found.targets if t.startswith("step")][:3] + ["answer"]
    targets += ["question"] if "question" in found.targets and len(targets) < 4 else []
    return [t for t in targets if t != "steps" or "step2" not in targets]


def _detection_figures(found: Detection) -> dict[str, tuple[str, ...]]:
    """Name of each figure of rates -> lenses in it: a page per lens where there are many layers."""
    if found.n_layers <= 8:
        return {"detection": found.lenses}
    return {f"detection-{slug(name)}": (name,) for name in found.lenses}


def figures(plan: Plan, found: Detection, tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """Figures by file name."""
    from experiments.lens.figures import curves_figure, detection_figure, summary_figure

    rates, level, n = tables["rates"], plan.settings.level, found.n_layers
    remark = "Numbers of several tokens count by their " + ("first." if plan.rule == "first" else "every token.")
    drawn = {
        name: detection_figure(rates[rates["lens"].isin(lenses)], _drawn(found), plan.k, remark)
        for name, lenses in _detection_figures(found).items()
    }
    layers = sorted({0, n // 2, n - 1, n}) if n > 3 else list(range(n + 1))
    for target in _drawn(found):
        drawn[f"curves-{target}"] = curves_figure(rates, target, layers, level)
    entropy = tables["entropy"]
    drawn["entropy"] = summary_figure(entropy, "entropy", "entropy of the lens, nats", level)
    title = "share: most probable token is a number"
    return drawn | {"number-tokens": summary_figure(entropy, "number_first", title, level)}


def captions(plan: Plan, found: Detection) -> dict[str, str]:
    """Captions by file name."""
    said = {
        name: f"Share of prompts whose value is in the top {plan.k} of {', '.join(lenses)}, and chance level, at every "
        "latent and layer."
        for name, lenses in _detection_figures(found).items()
    }
    for target in _drawn(found):
        said[f"curves-{target}"] = f"Detection rate of {target} against k, by latent; dotted: chance level."
    over = f"{per_cent(plan.settings.level)} intervals over clusters"
    said["entropy"] = f"Entropy of what each lens reads, nats, by latent and layer; {over}."
    said["number-tokens"] = f"How often the most probable token is a number, by latent and layer; {over}."
    return said


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=DetectOptions,
    title="Detection of values by lenses",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=reading_identity,
)

run = STUDY.run


def main(options: DetectOptions) -> None:
    """Load, run, print the summary."""
    print(printed(run_study(STUDY, options, say=to_stderr), "Tables and figures: "))
