"""circuits.flow: the tree of a known model, parts that add up, pathways by hand, mentions that back each other up."""

from __future__ import annotations

import json

import networkx as nx
import pytest
import torch
from conftest import LM_KINDS, make_base, make_tokenizer
from induction_model import COPY, INDUCE, make_induction_model, make_texts

from circuits.flow import Sources, flow_tree, mention_check, pathways, sources, tree_record
from circuits.heads import Heads, head_sets
from circuits.writers import writing
from lm.errors import UserError
from lm.model import LanguageModel
from lm.text import left_padded

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


def eager(kind: str) -> LanguageModel:
    base = make_base(kind)
    base.set_attn_implementation("eager")
    return LanguageModel(base, make_tokenizer(named=False), name=kind)


def test_the_tree_of_a_known_model():
    """From the writer to the B that it copies, to the head that told it where: that one attends to the first A."""
    heads = Heads(make_induction_model())
    for ids, place, answer in make_texts(5):
        tree = flow_tree(heads, ids, [INDUCE], answer)
        root, child = f"2.{INDUCE[1]}@{len(ids) - 1}", f"1.{COPY[1]}@{place + 1}"
        assert tree.nodes[root]["probability"] > 0.9 and tree.nodes[root]["depth"] == 1
        assert list(tree.successors(root)) == [f"@{place + 1}"]
        assert tree.nodes[f"@{place + 1}"]["token"] == answer
        edge = tree.edges[root, f"@{place + 1}"]
        assert edge["attention"] > 0.9 and edge["kind"] == "attends"
        assert list(tree.successors(f"@{place + 1}")) == [child]
        assert tree.edges[f"@{place + 1}", child]["share"] > 0.2
        assert list(tree.successors(child)) == [f"@{place}"] and tree.nodes[f"@{place}"]["token"] == ids[place]
        assert tree.nodes[child]["depth"] == 2 and nx.is_directed_acyclic_graph(tree)
        back = nx.node_link_graph(json.loads(json.dumps(tree_record(tree))), edges="edges")
        assert dict(back.nodes) == dict(tree.nodes) and set(back.edges) == set(tree.edges)
        assert back.graph["target"] == answer
    shallow = flow_tree(heads, ids, [INDUCE], answer, depth=1)
    assert set(shallow) == {root, f"@{place + 1}"}
    assert len(flow_tree(heads, ids, [INDUCE], answer, least_attention=1.0)) == 1
    wide = flow_tree(heads, ids, [INDUCE, (2, 0)], answer, least_attention=0, least_share=-1, positions=2)
    assert len(wide) > len(tree)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_parts_add_up_to_what_heads_write(kind):
    model = eager(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    target, other = torch.tensor([7, 99, 40, 3]), torch.tensor([8, 11, 200, 100])
    width = batch.input_ids.shape[1]
    columns = torch.arange(width)
    parts = {
        "last": (columns == width - 1).expand(4, width),
        "before": (columns == width - 2).expand(4, width) & batch.attention_mask,
    }
    for against in (None, other):
        found = sources(heads, batch, parts, target, against, batch_size=3)
        assert found.parts == ("last", "before", "rest")
        expected = writing(heads, batch, target, against, with_alone=False).heads
        torch.testing.assert_close(found.written.sum(-1), expected, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(found.attention.sum(-1), torch.ones(4, model.n_layers, 4, dtype=torch.float64))
    assert float(found.written.abs().amax((0, 1, 2)).min()) > 1e-4, "every part writes something"


def test_sources_of_a_known_model():
    heads = Heads(make_induction_model())
    texts = make_texts(6)
    batch = left_padded([ids for ids, _, _ in texts], 0)
    columns = torch.arange(batch.input_ids.shape[1])
    parts = {
        "answer": torch.stack([columns == place + 1 for _, place, _ in texts]),
        "others": torch.stack([columns < place for _, place, _ in texts]),
    }
    found = sources(heads, batch, parts, torch.tensor([answer for _, _, answer in texts]))
    block, head = INDUCE
    assert float(found.attention[:, block - 1, head, 0].min()) > 0.9
    share = found.written[:, block - 1, head] / found.written[:, block - 1, head].sum(-1, keepdim=True)
    assert float(share[:, 0].min()) > 0.9
    assert pathways(found, head_sets(heads, [INDUCE])).tolist() == [1] * 6


def test_pathways_by_hand():
    written = torch.tensor([[3.0, 2.0, 0.4, 9.0], [5.0, -3.0, 0.0, 0.0]], dtype=torch.float64)
    found = Sources(("demonstration", "question", "chain", "rest"), torch.zeros(2, 1, 1, 4), written[:, None, None])
    writers = torch.ones(1, 1, dtype=torch.bool)
    assert pathways(found, writers, least=0.1).tolist() == [2, 1]  # of 14.4 in all; "rest" is no source
    assert pathways(found, writers, least=0.01).tolist() == [3, 1]
    for least, chosen in ((0.0, writers), (0.1, ~writers)):
        with pytest.raises(UserError, match=r"least must be in \(0, 1\] and there must be a writer"):
            pathways(found, chosen, least)


def test_two_mentions_back_each_other_up():
    """'A B … A B … A': either mention is enough for the answer, both corrupted take it away; with one there is none."""
    heads = Heads(make_induction_model())
    filler = [9, 10, 11]
    a, b, c = 1, 2, 5
    double = [7, a, b, *filler, a, b, 12, a]  # the first token has none before it and copies itself
    clean = left_padded([double], 0)
    corrupted = {
        "first": left_padded([[7, c, b, *double[3:]]], 0),
        "second": left_padded([[*double[:6], c, *double[7:]]], 0),
        "both": left_padded([[7, c, b, *filler, c, b, 12, a]], 0),
    }
    target = torch.tensor([b])
    found = mention_check(heads, clean, corrupted, target)
    assert float(found.clean) > 0.9 and float(found.probability["both"]) < 0.5
    assert float(found.probability["first"]) > 0.9 and float(found.probability["second"]) > 0.9
    assert float(found.backup("first", "second", "both")) > 0.4
    assert float(found.kl["both"]) > 1 > 0.2 > float(found.kl["first"])
    single = [7, 3, 4, *filler, a, b, 12, a]
    alone = mention_check(
        heads,
        left_padded([single], 0),
        {
            "first": left_padded([[7, 6, 4, *single[3:]]], 0),
            "second": left_padded([[*single[:6], c, *single[7:]]], 0),
            "both": left_padded([[7, 6, 4, *filler, c, b, 12, a]], 0),
        },
        target,
    )
    assert float(alone.backup("first", "second", "both")) == pytest.approx(0, abs=0.05)
    with pytest.raises(UserError, match="corruptions are first, second, both, got 'chain'"):
        found.backup("first", "second", "chain")
    with pytest.raises(UserError, match="corruption 'one' has 2 texts, the clean ones are 1"):
        mention_check(heads, clean, {"one": left_padded([double, double], 0)}, target)


def test_refusals(language_model):
    heads = Heads(make_induction_model())
    with pytest.raises(UserError, match="depth of 1 or more and a root, got 0 and 1"):
        flow_tree(heads, [1, 2, 1], [INDUCE], 2, depth=0)
    with pytest.raises(UserError, match=r"head must be in 0\.\.3, got 4"):
        flow_tree(heads, [1, 2, 1], [(1, 4)], 2)
    batch = left_padded([[1, 2, 3], [4]], 0)
    one = torch.tensor([[True, False, False], [False, False, True]])
    with pytest.raises(UserError, match="a column is in two parts"):
        sources(heads, batch, {"a": one, "b": one}, torch.tensor([1, 2]))
    with pytest.raises(UserError, match="part 'a' must have the shape of the batch and hold none of its padding"):
        sources(heads, batch, {"a": torch.ones(2, 3, dtype=torch.bool)}, torch.tensor([1, 2]))
    model = language_model("llama")
    with pytest.raises(UserError, match="attention='eager'"):
        flow_tree(Heads(model), [1, 2, 3], [(1, 0)], 5)
