"""`codi cot derive`: the chain-of-thought vector of a model, from its own answers.

The model answers every question twice, once asked for steps and once asked to answer at once. Of both runs the residual
stream of every layer is averaged over tokens (those that the model wrote, by default); v(q) is the first minus the
second, and the vector is the mean of v(q) over questions: every question weighs the same, however long its answers are.

Written beside it: the vector of all but one family of sets (ontology, babi, …), for questions that it has not seen the
like of, and shuffled vectors, in which the toss of a coin decides for every question which of its two answers counts as
the step-by-step one, at the norm of the vector. (Other partners for the pairs would change nothing: the mean of the
differences is the difference of the means.)

Trials: `texts` (prompt "steps" and "direct") and `means` (per set: mean difference and shuffled ones, at every layer).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from experiments.cot.asking import UNSTEERED
from experiments.cot.derive_figures import figures
from experiments.cot.measures import CONDITION, TRIALS, request, trial_rows
from experiments.cot.options import DeriveOptions
from experiments.cot.places import ITEMS, SHUFFLED, VECTOR, WITHOUT
from experiments.cot.tables import all_levels, mean_row
from experiments.cot.vectors import used_by, vector_bytes
from experiments.figures.style import number_text
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare, levels
from experiments.statistics.words import interval
from experiments.study.folder import TEXT
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.tasks.item_sets import family_of
from experiments.tasks.items import Item, ItemSplits
from lm.generate import generate
from lm.model import LanguageModel
from lm.terms import RunTokens
from steering.contrasts import Written, fit_runs, origin_of, pooled
from steering.control_vectors import ControlVector, VectorOrigin

__all__ = ["STUDY", "Plan", "main", "run"]

MEANS = pa.schema(
    [
        ("set", TEXT), ("kind", TEXT), ("draw", pa.int32()), ("layer", pa.int16()), ("n", pa.int32()),
        ("left_out", pa.int32()), ("digest", pa.string()), ("values", pa.list_(pa.float32())),
    ]
)  # fmt: skip
"""kind "pairs": mean of v(q) over the n questions of the set; "shuffled": its draws, at the same norm."""


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    origin: VectorOrigin
    sets: Mapping[str, int]
    tokens: RunTokens
    steps_text: str
    direct_text: str
    max_new_tokens: int
    temperature: float
    shuffles: int
    seed: int
    batch_size: int
    settings: Settings
    used: bytes


def make_plan(options: DeriveOptions, model: LanguageModel, prompts: ItemSplits) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: fewer than two questions.
    """
    counts = {name: sum(item.task == name for item in prompts.derivation) for name in _names(prompts.derivation)}
    if sum(counts.values()) < 2:
        raise ValueError(f"a vector needs two questions or more, got {sum(counts.values())}")
    return Plan(
        origin=origin_of(model),
        sets=counts,
        tokens=options.tokens,
        steps_text=options.steps_text,
        direct_text=options.direct_text,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        shuffles=options.shuffles,
        seed=options.seed,
        batch_size=options.batch_size,
        settings=options.statistics(options.seed),
        used=used_by(prompts.derivation, "derivation"),
    )


def _names(items: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(item.task for item in items))


def parts(plan: Plan) -> list[Part]:
    """Two trial tables, a part of each for every set."""
    asked = {
        "steps_text": plan.steps_text, "direct_text": plan.direct_text, "max_new_tokens": plan.max_new_tokens,
        "temperature": plan.temperature, "batch_size": plan.batch_size,
    }  # fmt: skip
    read = {"tokens": plan.tokens, "shuffles": plan.shuffles}
    found = []
    for name in plan.sets:
        found += [
            Part(f"texts-{name}", texts_part, {"name": name, **asked}, plan.seed, TRIALS, "texts"),
            Part(f"means-{name}", means_part, {"name": name, **read, **asked}, plan.seed, MEANS, "means"),
        ]
    return found


# --- Parts ------------------------------------------------------------------------------------------------------------

_Runs = dict[str, tuple[list[Written], list[str], list[bool]]]


def own_answers(
    bench: Workbench, name: str, seed: int, steps_text: str, direct_text: str, max_new_tokens: int, temperature: float,
    batch_size: int,
) -> _Runs:  # fmt: skip
    """The model's own answers to the questions of a set, asked in both ways: for `Workbench.once`.

    Returns:
        "steps" and "direct": token ids, texts, and whether each came to its end.
    """
    model, items = bench.model, [item for item in bench.prompts.derivation if item.task == name]
    found: _Runs = {}
    with bench.bar(2 * len(items), "answer", f"answering {name}") as advance:
        for side, sentence in (("steps", steps_text), ("direct", direct_text)):
            batch = model.encode([model.text_of(request(item, sentence)) for item in items])
            written = generate(
                model, batch, max_new_tokens, temperature=temperature, seed=_seed(seed, name, side),
                batch_size=batch_size,
            )  # fmt: skip
            asked = [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask, strict=True)]
            runs = [Written(before, after) for before, after in zip(asked, written.tokens, strict=True)]
            found[side] = (runs, written.texts, written.finished)
            advance(len(items))
    return found


def _seed(seed: int, name: str, what: str) -> int:
    """A seed of its own for each set and purpose, so that question 3 of two sets does not get the same draw."""
    return int(hashlib.sha256(f"{seed} {name} {what}".encode()).hexdigest()[:12], 16)


def _quietly(function: Callable[[int], object]) -> Callable[[int], None]:
    """The function without its result."""

    def call(number: int) -> None:
        function(number)

    return call


def texts_part(bench: Workbench, *, seed: int, name: str, **asked: object) -> pd.DataFrame:
    """What the model wrote to the questions of a set, both ways."""
    items = [item for item in bench.prompts.derivation if item.task == name]
    frames = []
    for side, (runs, texts, finished) in bench.once(own_answers, name, seed, **asked).items():  # type: ignore[arg-type]
        conditions = [{**UNSTEERED[side], "draw": -1}] * len(items)
        frames.append(trial_rows(items, texts, [len(run.written) for run in runs], finished, conditions))
    return pd.concat(frames, ignore_index=True)


def means_part(
    bench: Workbench, *, seed: int, name: str, tokens: RunTokens, shuffles: int, **asked: object
) -> pd.DataFrame:
    """Mean difference of a set at every layer, and its shuffled versions. A question is left out where one of its two
    answers is empty and tokens that were written are to be read; a set without any other has no rows."""
    answered = bench.once(own_answers, name, seed, **asked)  # type: ignore[arg-type]
    pairs = list(zip(answered["steps"][0], answered["direct"][0], strict=True))
    kept = [(a, b) for a, b in pairs if tokens != "generated" or (a.written and b.written)]
    if not kept:
        return pd.DataFrame({column: [] for column in MEANS.names})
    batch_size = int(str(asked["batch_size"]))
    with bench.bar(len(kept), "pair", f"reading {name}") as advance:
        found = fit_runs(
            bench.model, [a for a, _ in kept], [b for _, b in kept], tokens, batch_size=batch_size, draws=shuffles,
            seed=_seed(seed, name, "coins"), seen=_quietly(advance),
        )  # fmt: skip
    vector = found.vector("contrastive")
    rows = _rows(vector, name, "pairs", -1, len(pairs) - len(kept))
    for draw in range(shuffles):
        rows += _rows(found.shuffled(draw, vector), name, "shuffled", draw, len(pairs) - len(kept))
    return pd.DataFrame(rows, columns=MEANS.names)


def _rows(vector: ControlVector, name: str, kind: str, draw: int, left_out: int) -> list[dict[str, object]]:
    """A vector as rows of MEANS."""
    about = {"set": name, "kind": kind, "draw": draw, "n": vector.origin.n, "left_out": left_out,
             "digest": vector.origin.data_digest or ""}  # fmt: skip
    return [{**about, "layer": layer, "values": vector[layer].tolist()} for layer in vector.layers]


# --- Vectors ----------------------------------------------------------------------------------------------------------


def vectors_of_trials(plan: Plan, means: pd.DataFrame) -> dict[tuple[str, str, int], ControlVector]:
    """(set, kind, draw) -> vector, from the rows of MEANS.

    Raises:
        ValueError: no question has two answers.
    """
    if means.empty:
        raise ValueError("no question has two answers with words in them: there is nothing to derive a vector from")
    found = {}
    keys = means[["set", "kind", "draw"]].drop_duplicates()
    for name, kind, draw in keys.itertuples(index=False, name=None):
        rows = means[(means["set"] == name) & (means["kind"] == kind) & (means["draw"] == draw)]
        first = rows.iloc[0]
        origin = replace(
            plan.origin, method="contrastive", tokens=plan.tokens, n=int(first["n"]), data_digest=str(first["digest"])
        )
        directions = {
            int(row.layer): torch.tensor(np.asarray(row["values"], dtype=np.float32)) for _, row in rows.iterrows()
        }
        found[str(name), str(kind), int(draw)] = ControlVector(directions, origin)
    return found


def joined(plan: Plan, by_set: Mapping[tuple[str, str, int], ControlVector]) -> dict[str, ControlVector]:
    """File name -> vector: the whole one, those without one family, the shuffled ones at its norm."""
    own = {name: vector for (name, kind, _), vector in by_set.items() if kind == "pairs"}
    whole = pooled(list(own.values()))
    found = {VECTOR: whole}
    families = sorted({family_of(name) for name in own})
    for family in families if len(families) > 1 else ():
        others = [vector for name, vector in own.items() if family_of(name) != family]
        found[WITHOUT.format(family=family)] = pooled(others)
    for draw in range(plan.shuffles):
        mixed = pooled([by_set[name, "shuffled", draw] for name in own]).scaled(whole)
        origin = replace(mixed.origin, method="shuffled")
        found[SHUFFLED.format(draw=draw)] = ControlVector(mixed.directions, origin)
    return found


# --- Findings ---------------------------------------------------------------------------------------------------------


def norms_table(own: Mapping[str, ControlVector], whole: ControlVector) -> pd.DataFrame:
    """Norm of the vector and of each set's own at every layer, and the cosine of the two."""
    rows = []
    for name, vector in {"all": whole, **own}.items():
        norms, cosines = vector.norms(), vector.cosine(whole)
        rows += [
            {"set": name, "layer": layer, "norm": norms[layer], "cosine": cosines[layer], "n": vector.origin.n}
            for layer in vector.layers
        ]
    return pd.DataFrame(rows)


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Vectors, tables, figures and words."""
    texts = trials["texts"]
    by_set = vectors_of_trials(plan, trials["means"])
    files = joined(plan, by_set)
    whole = files[VECTOR]
    own = {name: vector for (name, kind, _), vector in by_set.items() if kind == "pairs"}
    shuffled = [vector for vector in files.values() if vector.origin.method == "shuffled"]
    asked = (UNSTEERED["steps"], UNSTEERED["direct"])
    tables = {
        "levels": all_levels(texts, plan.settings),
        "by_set": levels(texts, ("set", *CONDITION), "chain", plan.settings),
        "difference": compare(texts, [asked], CONDITION, "chain", plan.settings),
        "norms": norms_table(own, whole),
        "shuffled": pd.DataFrame(
            [
                {"draw": draw, "layer": layer, "cosine": cosine}
                for draw, vector in enumerate(shuffled)
                for layer, cosine in vector.cosine(whole).items()
            ],
            columns=["draw", "layer", "cosine"],
        ),
        "sets": pd.DataFrame(
            [
                {"set": name, "questions": number, "pairs": own[name].origin.n if name in own else 0}
                for name, number in plan.sets.items()
            ]
        ),
    }
    caption = (
        "Norm of the vector (all sets, and each set's own) at every layer, cosine of each set's own vector with that "
        "of all sets (which it is part of), and cosines between layers."
    )
    return Findings(
        words(plan, tables, whole),
        tables,
        lambda: figures(tables["norms"], whole.cosines().numpy(), whole.layers),
        {"vector": caption},
        files={**{name: vector_bytes(vector) for name, vector in files.items()}, ITEMS: plan.used},
    )


_READ: dict[RunTokens, str] = {
    "generated": "the tokens that were written",
    "all": "prompt and written tokens",
    "last-prompt": "the last token of the prompt",
}


def words(plan: Plan, tables: Mapping[str, pd.DataFrame], whole: ControlVector) -> list[Section]:
    """The summary, section by section."""
    sets = tables["sets"]
    taken = ", ".join(f"{row.set} {row.pairs}" for row in sets.itertuples())
    dropped = int((sets["questions"] - sets["pairs"]).sum())
    how = "greedy" if plan.temperature == 0 else f"drawn at temperature {plan.temperature:g}, seed {plan.seed}"
    lost = f" {dropped} questions are left out: one of their answers is empty." if dropped else ""
    shown = tables["norms"].query("set == 'all'")
    middle = shown[shown["layer"].isin([1, *np.linspace(1, whole.layers[-1], 5).round().astype(int).tolist()])]
    lengths = ", ".join(f"layer {row.layer}: {row.norm:.2f}" for row in middle.itertuples())
    found = [
        Section(
            f"Vector of {whole.origin.n} questions ({taken}), answers {how}, at most {plan.max_new_tokens} tokens, "
            f"mean over {_READ[plan.tokens]}, then over questions.{lost} Behind the questions stand "
            f"“{plan.steps_text}” and “{plan.direct_text}”."
        ),
        Section(_do_they_differ(plan, tables), "Do the two sentences make a difference"),
        Section(f"Coefficient 1 adds the vector as long as it is at that layer: {lengths}.", "Norm by layer"),
    ]
    each = tables["norms"].query("set != 'all'").groupby("set", observed=True, sort=False)["cosine"].mean()
    if len(each) > 1:
        text = "; ".join(f"{name} {value:.2f}" for name, value in each.items())
        found.append(
            Section(f"Cosine with the vector of all sets, mean over layers (each is a part of it): {text}.", "Sets")
        )
    if len(tables["shuffled"]):
        draws = tables["shuffled"].groupby("draw")["cosine"].mean()
        text = ", ".join(number_text(value, "+.2f") for value in draws)
        found.append(
            Section(
                f"Cosine with the vector, mean over layers: {text}. The more questions, the less of the vector is left "
                "after the toss of a coin for each.",
                "Shuffled vectors",
            )
        )
    return found


def _do_they_differ(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> str:
    """Chains and length of the answers that the vector was made of."""
    rates = {side: mean_row(tables["levels"], "chain", UNSTEERED[side]) for side in ("steps", "direct")}
    lengths = {side: mean_row(tables["levels"], "words", UNSTEERED[side]) for side in ("steps", "direct")}
    gap = tables["difference"].iloc[0]
    told = (
        ""
        if gap["lower"] > 0
        else " More chains where steps are asked for are not shown by these answers: whatever the vector holds, chains "
        "that can be checked are not known to be in it."
    )
    return (
        f"Chains (a valid step before the answer), per cent with {100 * plan.settings.level:g} % intervals: asked for "
        f"steps {interval(rates['steps'])}, asked to answer at once {interval(rates['direct'])}, difference "
        f"{interval(gap, 'difference')} points.{told} Words: {interval(lengths['steps'], scale=1)} and "
        f"{interval(lengths['direct'], scale=1)}."
    )


# --- Command ----------------------------------------------------------------------------------------------------------

STUDY = Study(
    options=DeriveOptions,
    title="Chain-of-thought vector, derived",
    prompts=lambda options, model: options.load_splits(options.seed, model.tokenizer),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main
