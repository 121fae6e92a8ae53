"""experiments.circuit.traced: one pass says what the engine says of every prefix; parts of a text; planted movers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from circuit_model import count_all_as_right, make_circuit_model

from circuits.flow import sources as engine_sources
from circuits.heads import Heads
from circuits.writers import writing
from experiments.circuit.items import make_ontologies
from experiments.circuit.options import CircuitOptions
from experiments.circuit.traced import PARTS, mentions, movers, parts_of_text, sources, writers, writers_of
from experiments.circuit.trials import right_subtasks
from experiments.study.parts import Workbench
from experiments.tasks.alignment import encode
from lm.text import left_padded


@pytest.fixture(scope="module")
def bench():
    model = make_circuit_model()
    options = CircuitOptions(limit=2, hops=1, demonstrations=1, what=("flow",))
    with pytest.MonkeyPatch.context() as patched:
        count_all_as_right(patched)
        yield Workbench(model, make_ontologies(options, model.tokenizer))


def test_parts_of_a_text_cover_it_once(bench):
    item = bench.prompts.items[0]
    text = encode(bench.model.tokenizer, item.text, special_tokens=True)
    found = parts_of_text(item, text)
    assert (found.sum(1) == 1).all() and found[0, PARTS.index("rest")] and found[:, 3].sum() == 1
    said = {
        name: bench.model.tokenizer.decode([i for i, inside in zip(text.ids, column, strict=True) if inside])
        for name, column in zip(PARTS, found.T.tolist(), strict=True)
    }
    assert said["question"].startswith("### Input:") and said["question"].endswith("### Response:")
    assert said["chain"] == item.completion and said["demonstrations"].count(" Input:") == 1


def test_one_pass_says_what_the_engine_says_of_every_prefix(bench):
    heads, model, item = Heads(bench.model), bench.model, bench.prompts.items[1]
    chosen = right_subtasks(bench, 1, "last")
    batch = left_padded([one.probe.clean for one in chosen], model.pad_id)
    target = torch.tensor([one.probe.target for one in chosen])
    text = encode(model.tokenizer, item.text, special_tokens=True)
    members = parts_of_text(item, text)
    width = batch.input_ids.shape[1]
    parts = {name: torch.zeros(len(chosen), width, dtype=torch.bool) for name in PARTS[:-1]}
    for row, one in enumerate(chosen):
        n = len(one.probe.clean)
        for column, name in enumerate(PARTS[:-1]):
            parts[name][row, width - n :] = members[:n, column]
    expected = engine_sources(heads, batch, parts, target)
    found = sources(bench, seed=0, items=(1,), where="last")
    shape = (len(chosen), heads.n_blocks, heads.n_heads, len(PARTS))
    np.testing.assert_allclose(found["attention"].to_numpy().reshape(shape), expected.attention, atol=1e-5)
    np.testing.assert_allclose(found["written"].to_numpy().reshape(shape), expected.written, atol=1e-4)
    whole = writing(heads, batch, target)
    said = writers(bench, seed=0, items=(1,), where="last")
    np.testing.assert_allclose(said["contribution"].to_numpy().reshape(shape[:3]), whole.heads, atol=1e-4)
    np.testing.assert_allclose(said["alone"].to_numpy().reshape(shape[:3]), whole.alone, atol=1e-5)
    np.testing.assert_allclose(said["total"].to_numpy().reshape(shape[:3])[:, 0, 0], whole.total, atol=1e-4)


def test_writers_are_the_heads_with_the_largest_shares(bench):
    said = writers(bench, seed=0, items=(0, 1), where="last")
    chosen = writers_of(bench, (0, 1), "last", 3)
    assert chosen is not None and int(chosen.sum()) == 3
    share = (said["contribution"] / said["total"]).groupby([said["block"], said["head"]]).mean()
    inside = [share[block + 1, head] for block, head in chosen.nonzero().tolist()]
    assert sorted(inside) == sorted(share.nlargest(3))


def test_movers_attend_from_objects_to_subjects(bench, monkeypatch):
    """A head that looks back by a number of tokens has no contrast; one that looks at the subject has."""
    real = Heads.run

    def planted(self, batch, *given, patterns=False, **options):
        found = real(self, batch, *given, patterns=patterns, **options)
        if patterns is not False and len(patterns) > 1:
            assert found.patterns is not None
            found.patterns[:] = 0
            back = 2
            for i, query in enumerate(patterns):
                found.patterns[0, 0, 0, i, query - back] = 1  # positional: always two back
            for query, subject in spots:
                found.patterns[0, 1, 1, list(patterns).index(query), subject] = 1
        return found

    item = bench.prompts.items[0]
    text = encode(bench.model.tokenizer, item.text, special_tokens=True)
    ends = {(m.sentence, m.role): text.last(m.span) for m in item.mentions if m.part == "question" and not m.query}
    spots = [(ends[n, "object"], ends[n, "subject"]) for n in sorted({n for n, _ in ends})]
    monkeypatch.setattr(Heads, "run", planted)
    table = movers(Workbench(bench.model, bench.prompts), seed=0, items=(0,), where="last")
    contrast = (table["attention"] - table["control"]).groupby([table["block"], table["head"]]).mean()
    assert contrast[2, 1] == 1 and contrast.drop((2, 1)).abs().max() < 0.2
    assert table.set_index(["block", "head"]).loc[(1, 0), "attention"] == pytest.approx(
        np.mean([q - s == 2 for q, s in spots])
    )


def test_mentions_are_corrupted_one_by_one(bench):
    table = mentions(bench, seed=0, items=(0, 1), where="last")
    assert set(table["subtask"]) == {5} and len(table) == 2 * 4
    none = table[table["corruption"] == "none"]
    assert (none["kl"] == 0).all() and (table[table["corruption"] != "none"]["kl"] > 0).all()
    assert isinstance(table, pd.DataFrame) and table["probability"].between(0, 1).all()
