"""`codi circuit`: how a written chain of thought is made, head by head.

    codi circuit                                   # the reasoner adapter of SmolLM2, two-hop ontologies, all parts
    codi circuit --model checkpoints/smollm2 --what rift mixing    # the untouched model, two parts only
    codi circuit --positions all                   # heads patched at every token, as published; many times as long

Fictional ontologies with six solved ones before them. *effects*: at every word of the gold chain that the model
predicts, an earlier mention of the word is exchanged, and the clean output of one head at a time is put into the
corrupted run; E is the share of KL(clean ‖ corrupted) that this takes away, ratio of means over items. *knockout*:
heads ranked by E, the best ones kept, all others silenced. *writers* and *flow*: which heads write the words, and from
which part of the text. *mixing*: what pairs of residual streams tell of the relation of two words. *rift*: pretraining
against context, layer by layer. One run is one model: for the adapter and the untouched model there are two.

Source: Dutta et al. 2024, How to think step-by-step, arXiv 2402.18312.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.circuit.claims import Setting, make_claims
from experiments.circuit.items import Ontologies, make_ontologies
from experiments.circuit.options import CircuitOptions
from experiments.circuit.silenced import ABLATED, KEPT, PUBLISHED_SHARE, Ranking, ablated, kept
from experiments.circuit.streams import MIXING, RIFT, mixing, priors
from experiments.circuit.tables import chosen_table, circuit_table, effect_table, kept_table, prediction_table
from experiments.circuit.tables_traced import (
    N_WRITERS,
    ablation_table,
    crossing_table,
    mention_table,
    mixing_table,
    mover_table,
    pathway_rows,
    pathway_table,
    rift_table,
    source_table,
    writer_table,
)
from experiments.circuit.traced import (
    MENTIONS,
    MOVERS,
    SOURCES,
    TREE,
    WRITERS,
    mentions,
    movers,
    sources,
    tree,
    writers,
)
from experiments.circuit.trials import (
    EFFECTS,
    HOPS,
    PREDICTIONS,
    effect_rows,
    effects,
    hop_rows,
    hops,
    predictions,
)
from experiments.circuit.words import (
    flow_section,
    knockout_section,
    mixing_section,
    patching_section,
    rift_section,
    writers_section,
)
from experiments.statistics.clusters import Settings
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lm.model import LanguageModel

__all__ = ["STUDY", "Plan", "main"]

PART_ITEMS = 2
"""Items in one part: how much an interruption can cost."""
TOKENS_PER_ROW = 8
"""A patched row is a few tokens: --batch-size rows are so many tokens at once."""
PROBED_LAYERS = 10
"""Layers between the first and the last at which pairs are probed, about."""


@dataclass(frozen=True)
class Plan:
    """A run with everything resolved.

    Attributes:
        options: as given.
        n_items: ontologies.
        blocks: that are patched.
        n_blocks, n_heads: of the model.
        layers: that pairs are probed at.
        settings: resamples, level, seed.
    """

    options: CircuitOptions
    n_items: int
    blocks: tuple[int, ...]
    n_blocks: int
    n_heads: int
    layers: tuple[int, ...]
    settings: Settings

    @property
    def published(self) -> int:
        """Heads kept in a circuit of the published share."""
        total = self.n_blocks * self.n_heads
        return max(1, min(total - 1, round(PUBLISHED_SHARE * total)))

    @property
    def last(self) -> int:
        """Number of the last induction subtask."""
        return 4 * self.options.hops + 1

    @property
    def traced(self) -> tuple[int, ...]:
        """Items that are traced."""
        return tuple(range(min(self.options.traced, self.n_items)))


def make_plan(options: CircuitOptions, model: LanguageModel, prompts: Ontologies) -> Plan:
    """Options against the model."""
    blocks = tuple(range(1, model.n_layers + 1, options.step))
    every = max(1, round(model.n_layers / PROBED_LAYERS))
    layers = tuple(sorted({*range(0, model.n_layers + 1, every), model.n_layers}))
    settings = options.statistics(options.seed)
    return Plan(options, len(prompts.items), blocks, model.n_layers, model.n_heads, layers, settings)


def parts(plan: Plan) -> list[Part]:
    """Predictions of all items, then what was asked for."""
    options, what = plan.options, set(plan.options.what)
    items = tuple(range(plan.n_items))
    where = {"where": options.where}
    found = [Part("predictions", predictions, {"items": items, **where}, schema=PREDICTIONS)]
    groups = tuple(items[start : start + PART_ITEMS] for start in range(0, plan.n_items, PART_ITEMS))
    tokens = TOKENS_PER_ROW * options.batch_size
    how: dict[str, Any] = {"positions": options.positions, "blocks": plan.blocks, "tokens_at_once": tokens}
    if what & {"effects", "knockout"}:
        for group in groups:
            found.append(
                Part(f"effects-{group[0] + 1}", effects, {"items": group, **where, **how}, schema=EFFECTS,
                     table="effects", shared=(effect_rows, (group, options.where, *how.values())))
            )  # fmt: skip
    if "knockout" in what:
        found.append(Part("hops", hops, how, schema=HOPS, shared=(hop_rows, tuple(how.values()))))
        ranking = Ranking(groups, options.where, options.positions, plan.blocks, tokens)
        for name in ("held_out", "unseen"):
            arguments = {"ranking": ranking, "draws": options.draws, "which": name}
            found.append(Part(f"kept-{name}", kept, arguments, options.seed, KEPT, table="kept"))
    traced: dict[str, Any] = {"items": plan.traced, **where}
    if what & {"writers", "flow"}:
        found.append(Part("writers", writers, traced, schema=WRITERS))
    if "writers" in what:
        arguments = {**traced, "n": N_WRITERS, "draws": options.draws}
        found.append(Part("ablated", ablated, arguments, options.seed, ABLATED))
    if "flow" in what:
        found += [
            Part("sources", sources, traced, schema=SOURCES),
            Part("movers", movers, traced, schema=MOVERS),
            Part("mentions", mentions, traced, schema=MENTIONS),
            Part("tree", tree, {**traced, "subtask": plan.last}, schema=TREE),
        ]
    if "mixing" in what:
        found.append(Part("mixing", mixing, {"layers": plan.layers}, options.seed, MIXING))
    if "rift" in what:
        found.append(Part("rift", priors, {"items": plan.traced}, schema=RIFT))
    return found


# --- Findings ---------------------------------------------------------------------------------------------------------


def make_tables(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """Every table that the trials allow."""
    settings = plan.settings
    tables = {"predictions": prediction_table(trials["predictions"], settings)}
    if "effects" in trials:
        tables["effects"] = effect_table(trials["effects"], settings)
        tables["chosen_heads"] = chosen_table(trials["effects"], settings)
    if "kept" in trials:
        tables["kept"] = kept_table(trials["kept"], settings)
        tables["circuits"] = circuit_table(trials["kept"], settings)
    if "writers" in trials:
        tables["writers"] = writer_table(trials["writers"], settings)
    if "ablated" in trials:
        tables["ablation"] = ablation_table(trials["ablated"], settings)
    if "sources" in trials:
        tables["sources"] = source_table(trials["sources"], tables["writers"], settings)
        tables["pathways"] = pathway_table(pathway_rows(trials["sources"], tables["writers"]), settings)
        tables["movers"] = mover_table(trials["movers"], settings)
        tables["mentions"] = mention_table(trials["mentions"], settings)
    if "mixing" in trials:
        tables["mixing"] = mixing_table(trials["mixing"], settings)
    if "rift" in trials:
        tables["rift"] = rift_table(trials["rift"], settings)
        tables["crossing"] = crossing_table(trials["rift"], settings)
    return tables


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and summary."""
    tables = make_tables(plan, trials)
    what, level = set(plan.options.what), plan.settings.level
    total = plan.n_blocks * plan.n_heads
    sections = [Section(_about(plan))]
    if "effects" in tables:
        sections.append(patching_section(tables, level))
    if "kept" in tables:
        sections.append(knockout_section(tables, plan.published, total))
    if "writers" in what:
        sections.append(writers_section(tables, plan.n_blocks))
    if "flow" in what:
        sections.append(flow_section(tables, plan.n_blocks))
    if "mixing" in tables:
        sections.append(mixing_section(tables))
    if "rift" in tables:
        sections.append(rift_section(tables, plan.n_blocks))
    setting = Setting(plan.n_blocks, plan.published, plan.last, plan.options.demonstrations, plan.settings)
    grown = trials["tree"]["record"].tolist() if "tree" in trials else []
    captions = _captions(plan)
    shown = _shown(tables, grown)
    return Findings(
        sections, tables, lambda: _figures(plan, tables, shown, grown), {name: captions[name] for name in shown},
        claims=make_claims(trials, setting),
        files={"flow_tree.json": grown[0].encode()} if grown else {},
    )  # fmt: skip


def _about(plan: Plan) -> str:
    """What was done, in words."""
    options = plan.options
    left = "" if options.step == 1 else f" (blocks {', '.join(map(str, plan.blocks))})"
    at = "every token" if options.positions == "all" else (
        "the last token only: what a head does earlier in the text does not show (--positions all, as published)"
    )  # fmt: skip
    return (
        f"{plan.n_items} ontologies of {options.hops} hops, {options.demonstrations} solved ones before each; words of "
        f"the lexicon {options.lexicon!r}. At each word of the gold chain an earlier mention is exchanged "
        f"({options.where}), and each of the {plan.n_heads} heads of each of the {plan.n_blocks} blocks{left} is put "
        f"back at {at}. E: share of KL(clean ‖ corrupted) that this takes away; 1 is full recovery. Only items count "
        f"whose word the model predicts. Parts of this run: {', '.join(options.what)}."
    )


def _shown(tables: dict[str, pd.DataFrame], grown: list[str]) -> list[str]:
    """Names of the figures that there is something for."""
    names = {"effects": "effects", "kept": "knockout", "sources": "pathways", "mixing": "mixing", "rift": "rift"}
    found = [figure for table, figure in names.items() if table in tables and len(tables[table])]
    return [*found, "flow_tree"] if grown else found


def _captions(plan: Plan) -> dict[str, str]:
    return {
        "effects": "E of every head (columns) of every block (rows), by subtask.",
        "knockout": "Agreement with the whole model against heads kept, held-out items. The first panel has intervals "
        "over items; grey: where random sets of as many heads lie.",
        "pathways": f"From where the {N_WRITERS} loudest writers take what they write, by subtask; intervals over "
        "items.",
        "mixing": "Accuracy of probes of two words' relation, by layer; test words are new; intervals over texts.",
        "rift": "Probability of what the context says and of what pretraining says, by the logit lens, by kind of word "
        "that is predicted; intervals over items.",
        "flow_tree": "Flow tree of one inferred word: blue arrows from a head to the tokens that it attends to, grey "
        "ones from a token to the heads that wrote there; thickness: attention, share.",
    }


def _figures(plan: Plan, tables: dict[str, pd.DataFrame], shown: list[str], grown: list[str]) -> dict[str, Figure]:
    from experiments.circuit import figures

    named = [name for name in ("writers", "movers") if name in tables]
    marks: dict[str, list[int]] = {name: tables[name].head(N_WRITERS)["block"].tolist() for name in named}
    makers = {
        "effects": lambda: figures.draw_effects(tables["effects"], plan.n_blocks, plan.n_heads),
        "knockout": lambda: figures.draw_kept(tables["kept"], plan.n_blocks * plan.n_heads),
        "pathways": lambda: figures.draw_pathways(tables["sources"]),
        "mixing": lambda: figures.draw_mixing(tables["mixing"]),
        "rift": lambda: figures.draw_rift(tables["rift"], marks),
        "flow_tree": lambda: figures.draw_tree(json.loads(grown[0])),
    }
    return {name: makers[name]() for name in shown}


def _prompts(options: CircuitOptions, model: LanguageModel) -> Ontologies:
    return make_ontologies(options, model.tokenizer)


STUDY: Study[CircuitOptions, Plan] = Study(
    options=CircuitOptions,
    title="Circuits of a written chain of thought",
    prompts=_prompts,
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
)

main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
