"""What components and the effects of edits are, in words. Knows nothing about trials, models or figures."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.latents.claims import STAR
from experiments.latents.pca.along import SPACES
from experiments.latents.pca.components import QUANTITIES
from experiments.latents.pca.plan import Plan
from experiments.latents.pca.where import KINDS
from experiments.statistics.effects import Selector, row_of
from experiments.statistics.words import interval, p_text
from experiments.study.edits.words import singles, together
from experiments.study.result import Section

__all__ = ["intervals", "words"]

Tables = Mapping[str, pd.DataFrame]


def words(plan: Plan, tables: Tables) -> list[Section]:
    """The summary, section by section."""
    return [
        Section(_variance_words(plan, tables["variance"]), "Variance"),
        Section(_token_words(tables["token_alignment"]), "End of thought"),
        Section(_alignment_words(tables["alignment"]), "Steering directions"),
        Section(_parity_words(tables["parity"]), "Even and odd"),
        Section(_along_words(tables), "Along components"),
        Section(_cell_words(plan, tables), "Grid"),
        Section(_where_words(plan, tables), "Where an edit goes"),
    ]


def intervals(plan: Plan) -> str:
    """Which intervals are shown."""
    return f"{100 * plan.settings.level:g} % intervals over clusters"


def _variance_words(plan: Plan, variance: pd.DataFrame) -> str:
    n = plan.n_latents
    lines = [
        "Share of the first components over all latents, and of the first one within single latents:",
        "",
        f"| quantity | pc1 | pc2 | pc3 | pc1..5 | pc1 within latent 1..{n} |",
        "|---|---|---|---|---|---|",
    ]
    for name in QUANTITIES:
        part = variance[variance["quantity"] == name]
        shares = part[part["latent"] == 0]["share"].tolist()
        within = [row_of(part, {"latent": k, "component": 1})["share"] for k in plan.latents]
        shown = [f"{share:.2f}" for share in (shares + [0.0] * 3)[:3]]
        lines.append(
            f"| {name} | {' | '.join(shown)} | {sum(shares[:5]):.2f} | {', '.join(f'{x:.2f}' for x in within)} |"
        )
    return "\n".join(lines)


def _token_words(tokens: pd.DataFrame) -> str:
    plain = tokens[(tokens["embedding"] == "plain") & (tokens["component"] <= 2)]
    each = [
        f"{row['quantity']} pc{row['component']}: {row['cosine']:+.2f} (rank {row['rank']} of {row['tokens']} tokens)"
        for _, row in plain.iterrows()
    ]
    return f"Cosine with its embedding: {'; '.join(each)}."


def _alignment_words(alignment: pd.DataFrame) -> str:
    aligned = alignment.groupby("quantity")[["first_two", "all_kept", "random_first_two"]].mean()
    each = [
        f"{name}: {row['first_two']:.2f} / {row['all_kept']:.2f} ({row['random_first_two']:.3f})"
        for name, row in aligned.iterrows()
    ]
    return (
        "Share of A−B (mean over pairs) in the first two components / in those kept (a random direction: first two): "
        f"{'; '.join(each)}."
    )


def _parity_words(parity: pd.DataFrame) -> str:
    each = [
        f"{row['quantity']}: {row['share']:.2f} against {row['best_other']:.2f} (rank {row['rank']} of "
        f"{row['divisions']})"
        for _, row in parity.iterrows()
    ]
    return (
        "Variance of the first two scores between them, against the best other division into equal groups (held-out "
        f"prompts): {'; '.join(each)}."
    )


def _along_words(tables: Tables) -> str:
    found = []
    for space, _ in SPACES:
        part = tables["along_baseline"]
        part = part[part["space"] == space]
        beyond = tables["along_random"]
        beyond = beyond[beyond["space"] == space]
        text = f"{space}: {int(beyond['matters'].sum())} of {len(beyond)} differ from random directions*"
        if len(part):
            worst = part.sort_values("difference").iloc[0]
            name = f"{space} {worst['latent']} pc{worst['component']} {'+' if worst['sign'] > 0 else '−'}"
            text += f"; largest change {name} {interval(worst, 'difference')} points"
        found.append(text)
    size = row_of(tables["sizes"], {"table": "along_random"})
    return f"Early exit: {'; '.join(found)}.\n\n\\{STAR}: {100 * size['size']:.1f} points ({size['words']})."


def _cell_words(plan: Plan, tables: Tables) -> str:
    """What the grid says of single cells, if its draws allow that, and of all cells of a space together."""
    evidence, cells, alpha = tables["evidence"], tables["cells"], plan.settings.alpha
    first = evidence.iloc[0]
    sentences = _exits(tables["visibility"])
    if few := singles(first, alpha):
        sentences.append(f"**{few[0].upper()}{few[1:]}.** That none stands out says nothing about the edits.")
    else:
        counts = [
            f"{space}: {int((part['verdict'] == 'improvement').sum())} improvements, "
            f"{int((part['verdict'] == 'harm').sum())} harms of {len(part)} cells"
            for space, part in cells.groupby("space", sort=False)
        ]
        sentences.append(f"Beyond baseline and random directions, family-wise {alpha:g}: {'; '.join(counts)}.")
    lines = [
        f"Early exit: {first['cells']} cells (pair, c and latent) in every space, {first['draws']} random directions. "
        + " ".join(sentences),
        "",
        "All cells of a space together, against random directions in the place of A−B:",
        "",
    ]
    for space, part in evidence.groupby("space", sort=False):
        rows = [row_of(part, {"tail": tail}) for tail in ("harm", "gain")]
        lines.append(f"- {space}: {'; '.join(together(row) for row in rows)}")
    return "\n".join(lines)


def _exits(visibility: pd.DataFrame) -> list[str]:
    """At which exits an edit has no room; the unsteered exits are the same in every space."""
    exits = visibility[visibility["space"] == visibility["space"].iloc[0]]
    sentences = []
    for tail, word, state in (("harm", "harm", "right"), ("gain", "improvement", "wrong")):
        full = exits[~exits[tail].astype(bool)]
        if len(full):
            most = f"{full[f'{tail}_clusters'].max()} of {full['n_clusters'].max()} clusters"
            sentences.append(
                f"Without the edit at most {most} hold an answer that is {state} at exit {', '.join(full['latents'])}: "
                f"no cell could show {'a' if tail == 'harm' else 'an'} {word} there, whatever the draws."
            )
    return sentences


# --- Where an edit goes -----------------------------------------------------------------------------------------------


def _edit(name: str, control: str = "direction", **more: str) -> Selector:
    return {"edit": name, "control": control, **more}


def _where_words(plan: Plan, tables: Tables) -> str:
    means = tables["where"]
    lines = [
        "Mean differences at c = ±1; changes in units of the natural spread over prompts, KL in nats:",
        "",
        "| edit | size | in the slot | KL at once | z of next latent | slot of next latent | KL after one more | h_n "
        "| KL at the end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = ("edit_size", "slot", "kl", "z_next", "slot_next", "kl_next", "h_last", "kl_end")
    for name, _, _ in KINDS:
        for control in ("direction", "random"):
            values = [row_of(means, _edit(name, control, measure=measure))["mean"] for measure in shown]
            lines.append(f"| {name}, {control} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    kl, slot, after = (
        row_of(tables["where_contrasts"], _edit("kv", measure=measure), _edit("embedding"))
        for measure in ("kl", "slot", "kl_next")
    )
    kv, embedding = (row_of(means, _edit(name, measure="slot"))["mean"] for name in ("kv", "embedding"))
    ratio = kv / max(embedding, 1e-9)
    lines += [
        "",
        f"KV minus embedding: KL at once {interval(kl, 'difference', 1, 3)} ({p_text(kl['p'])}); change of the slot "
        f"{interval(slot, 'difference', 1, 2)} spreads ({p_text(slot['p'])}), a ratio of {ratio:.1f}; "
        f"KL after one more latent {interval(after, 'difference', 1, 3)} ({p_text(after['p'])}).",
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
