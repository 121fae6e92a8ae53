"""`codi reasoner`: what a language model does when it is asked for steps, for the answer at once, or for nothing.

Every held-out question of the reasoner's tasks is asked in the three ways, so that ways are compared on the same
questions. Answers are greedy; where nothing is asked for, they are sampled at temperature 1 too, since a greedy model
never does what it would do once in ten times. The base of an adapter is asked the first of the same questions, in its
own form of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa

from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare, levels, row_of
from experiments.statistics.words import interval, p_text
from experiments.study.folder import write_whole
from experiments.study.parts import Part, Workbench
from experiments.study.result import Result, Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.tasks.items import Item, ItemSplits
from experiments.tasks.reasoner import DIRECT, STEPS, TASKS, generate
from experiments.tune.judge import judged
from experiments.tune.options import BEGIN, END, ReasonerOptions, parts_of_card
from lm.generate import generate as write
from lm.load import ADAPTER_CONFIG, base_of, load_lm
from lm.model import LanguageModel

__all__ = ["BEGIN", "END", "STUDY", "Plan", "main", "run", "write_card"]

INSTRUCTIONS = {"steps": STEPS, "direct": DIRECT, "neutral": ""}
TRIALS = pa.schema({
    "model": pa.string(), "mode": pa.string(), "temperature": pa.float64(), "task": pa.string(),
    "prompt_id": pa.string(), "cluster": pa.string(), "answer": pa.string(), "text": pa.string(),
    "parsed": pa.bool_(), "correct": pa.bool_(), "at_once": pa.bool_(), "chain": pa.bool_(), "gold": pa.bool_(),
    "words": pa.int32(),
})  # fmt: skip
"""One row per model ("model", or "base" for the base of an adapter), way of asking, temperature and question."""


@dataclass(frozen=True)
class Plan:
    """Who is asked, and how."""

    names: tuple[tuple[str, str], ...]
    """("model", its name), and ("base", its name) if it is asked as well."""
    base: str | None
    """Folder or hub id of the base, if it is asked."""
    base_items: int
    device: str
    dtype: str
    form: str
    max_new_tokens: int
    batch_size: int
    seed: int
    settings: Settings
    n: int
    """Questions of each task."""


def make_plan(options: ReasonerOptions, model: LanguageModel, prompts: ItemSplits) -> Plan:
    """Options resolved against the model."""
    folder = Path(options.model).expanduser()
    base = None
    if options.base_items and (folder / ADAPTER_CONFIG).is_file():
        base = options.base or base_of(folder)
    names = [("model", model.name), *([] if base is None else [("base", Path(base).name)])]
    return Plan(
        names=tuple(names),
        base=base,
        base_items=min(options.base_items, options.items),
        device=model.device.type,
        dtype=options.dtype,
        form=model.form,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        settings=options.statistics(options.seed),
        n=options.items,
    )


def questions(n: int, seed: int) -> ItemSplits:
    """n held-out questions of each task."""
    found = []
    for task in TASKS:
        for sample in generate(n, seed, "test", task, "steps"):
            kind = "word" if sample.choices else "number"
            name = f"{task}-{sample.sample_id}"
            found.append(
                Item(name, task, sample.question, sample.answer, kind, sample.choices, name, sample.chain)  # type: ignore[arg-type]
            )
    return ItemSplits(test=tuple(found))


def parts(plan: Plan) -> list[Part]:
    """One part per model, way of asking and temperature; the base is not sampled."""
    found = []
    for who, _ in plan.names:
        ways = [("steps", 0.0), ("direct", 0.0), ("neutral", 0.0), *([("neutral", 1.0)] if who == "model" else [])]
        for mode, temperature in ways:
            arguments = {
                "who": who, "base": plan.base, "base_items": plan.base_items, "device": plan.device,
                "dtype": plan.dtype, "mode": mode, "temperature": temperature,
                "max_new_tokens": plan.max_new_tokens, "batch_size": plan.batch_size,
            }  # fmt: skip
            name = f"{who}-{mode}{'-sampled' if temperature else ''}"
            found.append(Part(name, answers, arguments, plan.seed, TRIALS, table="answers"))
    return found


def load_base(bench: Workbench, name: str, device: str, dtype: str) -> LanguageModel:
    """The base of the adapter, in its own form of text."""
    return load_lm(name, device=device, dtype=dtype)  # type: ignore[arg-type]


def answers(
    bench: Workbench,
    *,
    who: str,
    base: str | None,
    base_items: int,
    device: str,
    dtype: str,
    mode: str,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """The answers of one model, asked in one way."""
    model: LanguageModel = bench.model
    items: Sequence[Item] = bench.prompts.test
    if who == "base":
        assert base is not None, "no base to be asked"
        model = bench.once(load_base, base, device, dtype)
        items = [item for task in TASKS for item in [i for i in items if i.task == task][:base_items]]
    rows = []
    with bench.bar(len(items), "answer", f"{who}, {mode}{', sampled' if temperature else ''}") as advance:
        for task in TASKS:
            asked = [item for item in items if item.task == task]
            texts = [model.text_of(f"{item.question} {INSTRUCTIONS[mode]}".strip()) for item in asked]
            written = write(model, texts, max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size)
            for item, text in zip(asked, written.texts, strict=True):
                rows.append(
                    {"prompt_id": item.prompt_id, "cluster": item.cluster, "task": task, "answer": item.answer}
                    | {"text": text.strip(), **judged(item, text.strip())}
                )
            advance(len(asked))
    return pd.DataFrame(rows).assign(model=who, mode=mode, temperature=temperature)[TRIALS.names]


# --- What is found ----------------------------------------------------------------------------------------------------

BY = ["model", "mode", "temperature", "task"]
OUTCOMES = {"accuracy": "correct", "chain": "chain", "gold": "gold", "at_once": "at_once"}


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Rates with intervals, and what asking for steps changes."""
    rows = trials["answers"]
    together = pd.concat([rows, rows.assign(task="all")], ignore_index=True)
    rates = pd.concat(
        [levels(together, BY, outcome, plan.settings).assign(measure=name) for name, outcome in OUTCOMES.items()],
        ignore_index=True,
    )
    pairs = [
        ({"model": who, "mode": "steps", "task": task}, {"model": who, "mode": "direct", "task": task})
        for who, _ in plan.names
        for task in (*TASKS, "all")
    ]
    gains = compare(together, pairs, BY, settings=plan.settings)
    sections = [Section(_about(plan))]
    for who, name in plan.names:
        n = plan.n if who == "model" else plan.base_items
        sections.append(Section(f"**{name}**, n = {n} of each task:"))
        sections.append(Section(_table(rates[rates["model"] == who])))
        sections.append(Section(_gain(gains[gains["model"] == who], plan.settings.level)))
    return Findings(sections, {"rates": rates, "gains": gains})


def _about(plan: Plan) -> str:
    base = "" if plan.base is None else "; its base is asked the first of the same questions in its own form of text"
    return (
        f"Held-out questions (other words, other numbers than in training), the same in every way of asking, in the "
        f'form "{plan.form}"{base}. Asked for steps, for the answer at once, or for nothing. Per cent '
        f"[{100 * plan.settings.level:g} % interval]. "
        "Chain: at least one valid step before the answer; right chain: chain and answer are the expected ones, word "
        "by word; bare answers: one word. Greedy, except where sampled (temperature 1) is said; up to "
        f"{plan.max_new_tokens} tokens."
    )


def _table(rates: pd.DataFrame) -> str:
    heads = {
        "for steps: accuracy": ("steps", 0.0, "accuracy"), "chain": ("steps", 0.0, "chain"),
        "right chain": ("steps", 0.0, "gold"), "at once: accuracy": ("direct", 0.0, "accuracy"),
        "any chain": ("direct", 0.0, "chain"), "nothing: accuracy": ("neutral", 0.0, "accuracy"),
        "bare answers": ("neutral", 0.0, "at_once"), "bare answers, sampled": ("neutral", 1.0, "at_once"),
    }  # fmt: skip
    if not (rates["temperature"] > 0).any():
        del heads["bare answers, sampled"]
    lines = [f"| asked | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for task in (*TASKS, "all"):
        cells = []
        for mode, temperature, measure in heads.values():
            row = row_of(rates, {"mode": mode, "temperature": temperature, "measure": measure, "task": task})
            cells.append(interval(row, digits=1))
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gain(gains: pd.DataFrame, level: float) -> str:
    words = []
    for _, row in gains.iterrows():
        words.append(f"{row['task']} {interval(row, 'difference')} ({p_text(row['fwer_p'])})")
    return (
        f"Accuracy when asked for steps minus when asked at once, points [{100 * level:g} % interval] (p of all these "
        f"contrasts as one family): {'; '.join(words)}."
    )


STUDY = Study(
    options=ReasonerOptions,
    title="Chains when asked",
    prompts=lambda options, model: questions(options.items, options.seed),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)


def write_card(path: Path, result: Result) -> None:
    """Put a result's words between the two marks of a card.

    Raises:
        ValueError: the card does not have them.
    """
    before, after = parts_of_card(path)
    words = "\n\n".join([f"Printed by `{result.command}`:", *(section.markdown() for section in result.sections)])
    write_whole(path, f"{before}{BEGIN}\n{words}\n{END}{after}".encode())


def run(options: ReasonerOptions, model: LanguageModel | None = None) -> Result:
    """The study; writes the card if one was named."""
    result = run_study(STUDY, options, model, say=to_stderr)
    if options.card is not None:
        write_card(options.card, result)
    return result


def main(options: ReasonerOptions) -> None:
    """Load, run, print the summary."""
    print(run(options).markdown())


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
