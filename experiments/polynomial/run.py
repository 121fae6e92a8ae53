"""`codi polynomial`: published claims about CODI on polynomial iteration, decided for one model.

    codi train --data polynomial --out runs/poly                        # a model of the task
    codi polynomial --model runs/poly/checkpoint
    codi polynomial --model … --task polynomial:m=97,b=3 --max-steps 3  # another modulus, two and three hops

s_t = s_(t-1) · x_t + b (mod m): every state before the answer is a bridge state. For each number of hops: accuracy;
where each state is read, by lens and probe, at h_0..h_n and at the end of thought; what hiding an input from the
latents, or from the answer, costs. Trains nothing but probes. Patching, anchors, necessity and the other studies of
latents take the same problems with --task polynomial.

Trials: `reads`, `answers` (measures.py). Runs as `codi polynomial` or `python -m experiments.polynomial`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.polynomial.claims import best_place, claims_of
from experiments.polynomial.figures import figure_of
from experiments.polynomial.measures import ANSWERS, READERS, READS, answers, reads
from experiments.polynomial.options import PolynomialOptions
from experiments.polynomial.plan import Plan, make_plan
from experiments.polynomial.words import words
from experiments.statistics.effects import differences, levels
from experiments.study.parts import Part
from experiments.study.run import Findings, Study, Trials

__all__ = ["STUDY", "Plan", "main", "run", "tables_of"]


def parts(plan: Plan) -> list[Part]:
    """Two parts per number of hops."""
    found = []
    for hops, asked in zip(plan.hops, plan.asked, strict=True):
        given = {"asked": asked, "hops": hops, "batch_size": plan.batch_size}
        read = {**given, "values": plan.m, "folds": plan.folds}
        hidden = {**given, "hidden": plan.hidden, "max_new_tokens": plan.max_new_tokens}
        found.append(Part(f"answers-{hops}", answers, hidden, plan.seed, ANSWERS, table="answers"))
        found.append(Part(f"reads-{hops}", reads, read, plan.seed, READS, table="reads"))
    return found


def tables_of(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """accuracy (hops); reads (hops, state, within: thought or end; place chosen on derivation prompts); grid (mean of
    every place, evaluation prompts); hidden (hops, number, reader: change of accuracy)."""
    answered, read, settings = trials["answers"], trials["reads"], plan.settings
    tested = read[read["side"] == "evaluation"]
    by = ["hops", "state", "method", "place", "layer"]
    rows = []
    for hops in plan.hops:
        for state in range(1, hops + 1):
            for within, places in (("thought", plan.latents), ("end", range(plan.n_latents + 1, plan.n_latents + 2))):
                where = best_place(read, hops, state, places)
                here = tested[(tested[by] == pd.Series(where)).all(axis=1)]
                rows.append(levels(here, by, "read", settings, (0.0, 1.0)).assign(within=within))
    number = ["hops", "number", "reader"]
    tried: list[dict[str, Any]] = [
        {"hops": hops, "number": t, "reader": who} for hops in plan.hops for t in range(hops + 1) for who in READERS
    ]
    change = differences(answered, [(one, {**one, "number": -1, "reader": ""}) for one in tried], number)
    long = [change[place].dropna().rename("change").reset_index().assign(**one) for place, one in enumerate(tried)]
    return {
        "accuracy": levels(answered[answered["number"] == -1], ["hops"], settings=settings),
        "reads": pd.concat(rows, ignore_index=True),
        "grid": tested.groupby(by, sort=True, observed=True)["read"].mean().reset_index(),
        "hidden": levels(pd.concat(long, ignore_index=True), number, "change", settings, (-1.0, 1.0)).rename(
            columns={"mean": "difference"}
        ),
    }


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure, claims and words."""
    tables = tables_of(plan, trials)
    caption = (
        "Share of prompts in which each state is read right at each latent (h_0: begin of thought) and at the end of "
        "thought, last layer: by the logit lens (above) and by linear probes (below). The last state is the answer."
    )
    return Findings(
        words(plan, tables), tables, lambda: {"reads": figure_of(plan, tables)}, {"reads": caption},
        claims_of(plan, trials),
    )  # fmt: skip


STUDY = Study(
    options=PolynomialOptions,
    title="Polynomial iteration",
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
