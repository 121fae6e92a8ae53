"""The trials of `codi circuit`: what each item's subtasks predict, and what every patched head does to them.

Knows nothing about what is concluded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from circuits.heads import Heads
from circuits.patching import Positions, Probe, patch
from experiments.circuit.items import HOP_PARTS, Subtask, hop_probe, subtasks
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from experiments.tasks.ontology_corruption import Where
from lm.text import left_padded

__all__ = ["EFFECTS", "HOPS", "PREDICTIONS", "effect_rows", "effects", "heads_of", "hop_rows", "hops", "predictions",
           "right_subtasks"]  # fmt: skip

_SUBTASK: dict[str, pa.DataType] = {"item": pa.int32(), "subtask": pa.int16(), "kind": TEXT}
PREDICTIONS = pa.schema(
    {
        **_SUBTASK,
        "right": pa.bool_(),
        "probability": pa.float64(),
        "tokens": pa.int32(),
        "tokens_run": pa.int32(),
    }.items()
)
"""One row per item and subtask: whether the gold word is the most probable one; tokens of the text, and from the first
exchanged one on."""
EFFECTS = pa.schema(
    {
        **_SUBTASK, "block": pa.int16(), "head": pa.int16(), "kl": pa.float64(), "kl_corrupted": pa.float64(),
        "probability": pa.float64(), "probability_clean": pa.float64(), "probability_corrupted": pa.float64(),
    }.items()
)  # fmt: skip
"""One row per item, subtask that is predicted rightly, and head; KL(clean ‖ ·) in nats, probabilities of the word."""


HOPS = pa.schema(
    {
        "item": pa.int32(), "part": TEXT, "block": pa.int16(), "head": pa.int16(), "kl": pa.float64(),
        "kl_corrupted": pa.float64(),
    }.items()
)  # fmt: skip
"""One row per item of one hop whose inference is right, part of the premises that is exchanged, and head."""


def heads_of(bench: Workbench) -> Heads:
    """The heads of the model; through `bench.once`."""
    return Heads(bench.model)


def _subtasks_of(bench: Workbench, item: int, where: Where) -> tuple[list[Subtask], pd.DataFrame]:
    """An item's subtasks, and their rows of the table of predictions from one pass over its whole text."""
    ontologies = bench.prompts
    found = subtasks(ontologies.items[item], ontologies.lexicon, bench.model.tokenizer, where)
    columns: dict[str, list[Any]] = {name: [] for name in PREDICTIONS.names}
    if found:
        longest = max((one.probe.clean for one in found), key=len)
        at = torch.tensor([[len(one.probe.clean) - 1 for one in found]])
        logits = bench.once(heads_of).run(left_padded([longest], bench.model.pad_id), at=at).logits[0].double()
        said = logits.log_softmax(-1).cpu()
        for row, one in zip(said, found, strict=True):
            target = one.probe.target
            for name, value in (
                ("item", item), ("subtask", one.number), ("kind", one.kind),
                ("right", int(row.argmax()) == target), ("probability", float(row[target].exp())),
                ("tokens", len(one.probe.clean)), ("tokens_run", len(one.probe.clean) - one.probe.changed),
            ):  # fmt: skip
                columns[name].append(value)
    return found, pd.DataFrame(columns)


def predictions(bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where) -> pd.DataFrame:
    """Rows of `PREDICTIONS` of some items."""
    return pd.concat([bench.once(_subtasks_of, item, where)[1] for item in items], ignore_index=True)


def right_subtasks(bench: Workbench, item: int, where: Where) -> list[Subtask]:
    """The subtasks of an item whose word is predicted."""
    found, table = bench.once(_subtasks_of, item, where)
    return [one for one, right in zip(found, table["right"], strict=True) if right]


def effects(
    bench: Workbench, *, seed: int, items: tuple[int, ...], where: Where, positions: Positions,
    blocks: tuple[int, ...], tokens_at_once: int,
) -> pd.DataFrame:  # fmt: skip
    """Rows of `EFFECTS` of some items: every head of the blocks, patched one at a time."""
    return bench.once(effect_rows, items, where, positions, blocks, tokens_at_once)


def effect_rows(
    bench: Workbench, items: tuple[int, ...], where: Where, positions: Positions, blocks: tuple[int, ...],
    tokens_at_once: int,
) -> pd.DataFrame:  # fmt: skip
    """The same through `bench.once`, for whoever ranks heads by it."""
    chosen = [(item, one) for item in items for one in right_subtasks(bench, item, where)]
    if not chosen:
        return EFFECTS.empty_table().to_pandas()
    heads = bench.once(heads_of)
    with bench.bar(
        len(chosen) * len(blocks) * heads.n_heads, "run", f"items {items[0] + 1} to {items[-1] + 1}"
    ) as moved:
        found_effects = patch(
            heads, [one.probe for _, one in chosen], positions=positions, blocks=blocks,
            tokens_at_once=tokens_at_once, advance=moved,
        )  # fmt: skip
    shape = (len(blocks), heads.n_heads, len(chosen))
    block, head, probe = (axis.ravel() for axis in np.indices(shape))

    def along(values: torch.Tensor) -> np.ndarray:
        return values.numpy()[probe]

    return pd.DataFrame(
        {
            "item": np.array([item for item, _ in chosen])[probe],
            "subtask": np.array([one.number for _, one in chosen])[probe],
            "kind": np.array([one.kind for _, one in chosen])[probe],
            "block": np.array(blocks)[block],
            "head": head,
            "kl": found_effects.values["kl"].numpy().ravel(),
            "kl_corrupted": along(found_effects.corrupted["kl"]),
            "probability": found_effects.values["probability"].numpy().ravel(),
            "probability_clean": along(found_effects.clean["probability"]),
            "probability_corrupted": along(found_effects.corrupted["probability"]),
        }
    )


def hops(
    bench: Workbench, *, seed: int, positions: Positions, blocks: tuple[int, ...], tokens_at_once: int
) -> pd.DataFrame:
    """Rows of `HOPS`."""
    return bench.once(hop_rows, positions, blocks, tokens_at_once)


def hop_rows(bench: Workbench, positions: Positions, blocks: tuple[int, ...], tokens_at_once: int) -> pd.DataFrame:
    """The same through `bench.once`, for whoever ranks heads by it."""
    ontologies, heads = bench.prompts, bench.once(heads_of)
    chosen: list[tuple[int, str, Probe]] = []
    for i, item in enumerate(ontologies.one_hop):
        for part in HOP_PARTS:
            try:
                chosen.append((i, part, hop_probe(item, part, ontologies.lexicon, bench.model.tokenizer)))
            except ValueError:  # no word that is aligned: the table says how many are left
                continue
    right = _right(heads, [probe for _, _, probe in chosen])
    chosen = [one for one, is_right in zip(chosen, right, strict=True) if is_right]
    if not chosen:
        return HOPS.empty_table().to_pandas()
    with bench.bar(len(chosen) * len(blocks) * heads.n_heads, "run", "one-hop items") as moved:
        found = patch(
            heads, [probe for _, _, probe in chosen], positions=positions, blocks=blocks,
            tokens_at_once=tokens_at_once, advance=moved,
        )  # fmt: skip
    block, head, probe = (axis.ravel() for axis in np.indices((len(blocks), heads.n_heads, len(chosen))))
    return pd.DataFrame(
        {
            "item": np.array([item for item, _, _ in chosen])[probe],
            "part": np.array([part for _, part, _ in chosen])[probe],
            "block": np.array(blocks)[block],
            "head": head,
            "kl": found.values["kl"].numpy().ravel(),
            "kl_corrupted": found.corrupted["kl"].numpy()[probe],
        }
    )


def _right(heads: Heads, probes: list[Probe]) -> list[bool]:
    """Whether the target is the most probable token after each clean text."""
    known: dict[tuple[int, ...], int] = {}
    for probe in probes:
        if probe.clean not in known:
            batch = left_padded([probe.clean], heads.model.pad_id)
            known[probe.clean] = int(heads.run(batch).logits[0].argmax())
    return [known[probe.clean] == probe.target for probe in probes]
