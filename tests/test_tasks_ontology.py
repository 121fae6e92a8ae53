"""Ontologies: a small prover agrees, cut points tell the next word, corruptions change what they name and no more."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tokenizer
from word_tokenizers import byte_tokens, merging_tokenizer, word_tokens

from experiments.tasks.alignment import check_aligned, encode, ids_of, single_token_words
from experiments.tasks.ontology import Ontology, Sentence, Word, answers, draw
from experiments.tasks.ontology_corruption import corrupt, corrupt_hop, corruptible
from experiments.tasks.ontology_pairs import mixing_texts
from experiments.tasks.ontology_text import OntologyItem, compose, generate, sentence_text
from experiments.tasks.ontology_words import FALSE, LEXICONS, TRAINING, UNSEEN, fit, plural_of
from experiments.tasks.prontoqa import parse_sentences, read_prontoqa

DATA = Path(__file__).resolve().parent / "data"
SHAPES = list(
    itertools.product((1, 2, 3, 4), ("ordered", "shuffled"), ("none", "relevant", "irrelevant"), ("none", "some"))
)


@pytest.fixture(scope="module")
def merging():  # type: ignore[no-untyped-def]
    texts = [item.text for item in generate(300, TRAINING, 2, seed="tokenizer", demonstrations=0)]
    return merging_tokenizer(texts, 900)


def prove(statements: list[str], query: str) -> bool:
    """An independent prover on the written sentences: saturate what holds of the entity by reading letters only."""
    name, verdict = query.split(" is ", 1)
    facts = {s.split(" is ", 1)[1] for s in statements if s.startswith(name + " is ")}
    while True:
        new = set()
        for sentence in statements:
            subject, verb, rest = re.fullmatch(r"(\S+) (is|are) (.+)", sentence).groups()  # type: ignore[union-attr]
            for fact in facts:
                if verb == "are" and subject.lower() == fact + "s":
                    new.add(rest.removesuffix("s"))
                if verb == "is" and subject.lower() == fact:
                    new.add(rest)
        if new <= facts:
            return verdict in facts
        facts |= new


def read_question(item: OntologyItem) -> tuple[list[str], str]:
    """Statements and query of an item, cut out of its text."""
    question = item.prompt.rsplit("### Input: ", 1)[1]
    stated, asked = question.split(" True or false: ")
    return [s.rstrip(".") for s in stated.split(". ")], asked.split(".")[0]


@pytest.mark.parametrize(("hops", "order", "distractors", "negation"), SHAPES)
def test_the_answer_and_the_chain_can_be_derived(hops: int, order: str, distractors: str, negation: str) -> None:
    items = generate(10, TRAINING, hops, 3, order, distractors, negation, demonstrations=0)  # type: ignore[arg-type]
    for item in items:
        statements, query = read_question(item)
        assert prove(statements, query) == item.ontology.answer
        written = item.completion.strip().split(". ")
        assert written[-1] == item.answer and len(written) == 2 * hops + 2
        name = written[0].split()[0]
        for i, step in enumerate(written[:-1]):
            known = [*statements[: len(statements)], *written[:i]]
            assert step in statements or prove(known, step)
            assert (step in statements) == (i == 0 or i % 2 == 1) and (i % 2 == 1 or step.startswith(name))
        contradicted = written[-2].split(" is ")[1]
        if not item.ontology.answer:
            asked = query.split(" is ")[1]
            family = TRAINING.family_of(contradicted.removeprefix("not "))
            assert asked != contradicted and asked.removeprefix("not ") in family
            if asked.removeprefix("not ") == contradicted.removeprefix("not "):
                assert asked.startswith("not ") != contradicted.startswith("not ")
    assert sum(item.ontology.answer for item in items) == 5


def test_the_prover_can_say_no() -> None:
    assert not prove(["Tumps are glorps", "Sam is glorp", "Tump is fast"], "Sam is fast")
    assert prove(["Glorp is not fast", "Tumps are glorps", "Sam is tump"], "Sam is not fast")


def test_distractors_do_not_change_the_answer_and_hide_it() -> None:
    for kind in ("relevant", "irrelevant"):
        for item in generate(40, TRAINING, 3, 1, "shuffled", kind, demonstrations=0):  # type: ignore[arg-type]
            statements, query = read_question(item)
            path = {sentence_text(s).rstrip(".") for s in item.ontology.chain}
            bare = [s for s in statements if s in path]
            assert len(bare) == 4 < len(statements)
            assert prove(bare, query) == prove(statements, query) == item.ontology.answer
            # the words of the right and of the wrong query are both stated, so presence does not tell
            asked = query.split()[-1]
            family = TRAINING.family_of(asked)
            assert sum(s.split()[-1] in family and " is " in s for s in statements) == 2
            assert any(s.split()[-1] == asked for s in statements)


def test_ordered_keeps_the_path_and_shuffled_does_not() -> None:
    def in_order(item: OntologyItem) -> bool:
        places = [item.ontology.statements.index(s) for s in item.ontology.chain[1::2]]
        last = item.ontology.statements[-1] == item.ontology.chain[0]
        return places == sorted(places) and last

    assert all(in_order(i) for i in generate(30, TRAINING, 4, demonstrations=0))
    assert not all(in_order(i) for i in generate(30, TRAINING, 4, order="shuffled", demonstrations=0))


def test_form_of_the_text() -> None:
    words = {text: Word(text, "concept") for text in ("tumpus", "jompus")}
    sam, fast, loud = Word("Sam", "entity"), Word("fast", "property"), Word("loud", "property")
    rules = (Sentence(words["tumpus"], words["jompus"], plural=True), Sentence(words["jompus"], fast))
    fact = Sentence(sam, words["tumpus"])
    chain = (fact, rules[0], Sentence(sam, words["jompus"]), rules[1], Sentence(sam, fast))
    ontology = Ontology((*rules, fact), Sentence(sam, loud), False, chain, 2, "ordered", "none", "made up")
    item = compose(ontology)
    assert item.text == (
        "### Input: Tumpuses are jompuses. Jompus is fast. Sam is tumpus. True or false: Sam is loud. "
        "Let us think step by step.\n### Response: Sam is tumpus. Tumpuses are jompuses. Sam is jompus. "
        "Jompus is fast. Sam is fast. False"
    )
    assert item.prompt.endswith("### Response:") and item.completion.startswith(" Sam is tumpus.")
    assert [cut.target for cut in item.cuts] == (
        "Sam tumpus Tumpuses jompuses Sam jompus Jompus fast Sam fast False".split()
    )
    kinds = {kind: [c.number for c in item.cuts if c.kind == kind] for kind in ("decision", "copy", "induction")}
    assert kinds == {"decision": [0, 2, 4, 6, 8], "copy": [1, 3, 7], "induction": [5, 9]}
    assert item.cuts[10].kind == "answer" and item.prefix(5).endswith("Tumpuses are jompuses. Sam is")
    assert compose(ontology, instruction="").prompt.endswith("Sam is loud.\n### Response:")
    with pytest.raises(ValueError, match="0..10, got 11"):
        item.cut(11)


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_cut_points_tell_the_next_word(hops: int, merging) -> None:  # type: ignore[no-untyped-def]
    for item in generate(6, TRAINING, hops, 5, "shuffled", "relevant", "some", demonstrations=2):
        assert [c.number for c in item.cuts] == list(range(4 * hops + 3))
        induction = [c.number for c in item.cuts if c.kind == "induction"]
        assert induction == [4 * k + 1 for k in range(1, hops + 1)]
        for cut in item.cuts:
            rest = item.text[len(item.prefix(cut.number)) :]
            assert rest.startswith(" " + cut.target) and item.text[slice(*cut.span)] == cut.target
            for tokenizer in (byte_tokens, merging):
                encoded = encode(tokenizer, item.text)
                if tokenizer is byte_tokens:
                    # the blank is a token of its own there: the first token of the word is its first letter
                    assert encoded.predicted(cut.span) == (cut.start - 1, ord(cut.target[0]))
                else:
                    position, target = encoded.predicted(cut.span)
                    assert list(encoded.ids[: position + 1]) == ids_of(merging)(item.prefix(cut.number))
                    assert target == ids_of(merging)(" " + cut.target)[0]


def test_every_mention_is_found() -> None:
    for item in generate(5, TRAINING, 2, 6, distractors="relevant", demonstrations=2):
        assert list(item.mentions) == sorted(item.mentions, key=lambda m: m.start)
        for word in item.ontology.words:
            forms = {word.text, word.text.capitalize(), plural_of(word.text), plural_of(word.text).capitalize()}
            found = [m.span() for m in re.finditer(r"\w+", item.text) if m[0] in forms]
            assert [m.span for m in item.mentions_of(word)] == found  # and so none is in a demonstration
        parts = item.sources
        assert sum(map(len, parts.values())) == len(item.mentions)
        assert all(end <= item.prompt_end for _, end in parts["question"])
        assert all(start > item.prompt_end for start, _ in parts["chain"])
        assert len(parts["chain"]) == 2 * 5 and all(m.part == "question" for m in item.mentions if m.query and
                                                    m.demonstration < 0)  # fmt: skip
        start = item.text.rindex("### Input:")
        assert all(end < start for _, end in parts["demonstration"])


@pytest.mark.parametrize("lexicon", [TRAINING, FALSE], ids=["training", "false"])
def test_corruptions_change_exactly_what_they_name(lexicon) -> None:  # type: ignore[no-untyped-def]
    tried = 0
    for item in generate(6, lexicon, 2, 7, distractors="irrelevant", demonstrations=1):
        for cut in item.cuts:
            for where in ("last", "question", "chain", "both"):
                if not corruptible(item, cut.number, where):  # type: ignore[arg-type]
                    with pytest.raises(ValueError, match="mentioned|one word to exchange|'not'"):
                        corrupt(item, cut.number, where, lexicon)  # type: ignore[arg-type]
                    continue
                found = corrupt(item, cut.number, where, lexicon, tokenizer=word_tokens)  # type: ignore[arg-type]
                tried += 1
                clean, other = item.text.split(), found.text.split()
                differ = [i for i, (a, b) in enumerate(zip(clean, other, strict=True)) if a != b]
                assert len(differ) == len(found.exchanges) == (2 if where == "both" else 1)
                for i, change in zip(differ, found.exchanges, strict=True):
                    assert clean[i].strip(".") == change.old == item.text[slice(*change.clean)]
                    assert other[i].strip(".") == change.new == found.text[slice(*change.corrupted)]
                    assert change.clean[1] <= cut.start and change.old.istitle() == change.new.istitle()
                assert len(encode(word_tokens, item.text)) == len(encode(word_tokens, found.text))
                assert found.text[slice(*found.target[1])] == cut.target
                assert found.prefix.count(" ") == item.prefix(cut.number).count(" ")
                if cut.word is not None:
                    assert found.old == cut.word and found.new not in {m.word for m in item.mentions}
                    last = item.mentions_of(cut.word, before=cut.start)[-1]
                    if where == "last":
                        assert found.exchanges[0].clean == last.span
                    if where == "chain":
                        assert last.part == "chain" and found.exchanges[0].clean == last.span
    assert tried > 100


def test_corrupting_the_answer_turns_it() -> None:
    for item in generate(20, TRAINING, 2, 8, negation="some", demonstrations=0):
        for where in ("question", "chain"):
            if not corruptible(item, 10, where):  # type: ignore[arg-type]
                assert item.ontology.query.negated != item.ontology.conclusion.negated
                continue
            found = corrupt(item, 10, where, TRAINING)  # type: ignore[arg-type]
            sentences = found.prefix.rsplit("### Input:", 1)[1].split(". ")
            query = next(s for s in sentences if "True or false" in s).split(": ")[1]
            same = query == found.prefix.rstrip(".").rsplit(". ", 1)[1]
            assert same != item.ontology.answer
            assert len(found.exchanges) == 1
    with pytest.raises(ValueError, match="where must be one of last, question, chain, both, got 'here'"):
        corrupt(item, 3, "here", TRAINING)  # type: ignore[arg-type]


def test_all_mentions_can_be_exchanged() -> None:
    item = generate(1, TRAINING, 2, 9, demonstrations=1)[0]
    word = item.cut(5).word
    assert word is not None
    found = corrupt(item, 5, "both", TRAINING, every=True)
    expected = [m.span for m in item.mentions_of(word, before=item.cut(5).start)]
    assert [e.clean for e in found.exchanges] == expected and len(expected) >= 3


def test_the_three_corruptions_of_one_hop() -> None:
    for item in generate(10, TRAINING, 1, 10, demonstrations=0):
        fact, rule = (sentence_text(s) for s in item.ontology.chain[:2])
        for part in ("concept", "subject", "property"):
            for where, number in (("question", 1), ("chain", 1), ("both", 2)):
                found = corrupt_hop(item, part, TRAINING, where, tokenizer=word_tokens)  # type: ignore[arg-type]
                assert len(found.exchanges) == number and found.number == 5 and item.cuts[5].kind == "induction"
                touched = rule if part == "property" else fact
                assert item.text.count(touched) - found.text.count(touched) == number
                changed = [w for w, v in zip(item.text.split(), found.text.split(), strict=True) if w != v]
                expected = {"concept": fact.split()[-1], "subject": fact.split()[0], "property": rule.split()[-1]}
                assert changed == [expected[part]] * number
    two = generate(1, TRAINING, 2, demonstrations=0)[0]
    with pytest.raises(ValueError, match="for items of 1 hop, got 2"):
        corrupt_hop(two, "concept", TRAINING)
    with pytest.raises(ValueError, match="part must be one of concept, subject, property"):
        corrupt_hop(item, "object", TRAINING)  # type: ignore[arg-type]


def test_words_of_several_tokens_stay_aligned_or_are_refused(merging) -> None:  # type: ignore[no-untyped-def]
    fitted = fit(TRAINING, merging)
    assert 12 <= len(fitted.concepts) < len(TRAINING.concepts)
    lengths = set()
    for item in generate(6, fitted, 2, 11, demonstrations=1):
        clean = encode(merging, item.text)
        lengths.add((len(clean), *(clean.predicted(cut.span)[0] for cut in item.cuts[:-1])))
        for cut in item.cuts[:-1]:
            found = corrupt(item, cut.number, "last", fitted, tokenizer=merging)
            other = encode(merging, found.text)
            differ = {i for i, (a, b) in enumerate(zip(clean.ids, other.ids, strict=True)) if a != b}
            inside = clean.positions(found.exchanges[0].clean)
            assert inside[0] in differ and differ <= set(inside)
            assert clean.predicted(found.target[0]) == other.predicted(found.target[1])
    item = generate(1, TRAINING, 2, 12, demonstrations=0)[0]
    cut = item.cut(5)
    assert cut.word is not None
    one = TRAINING.concepts[:1] if TRAINING.concepts[0] != cut.word.text else TRAINING.concepts[1:2]
    longer = replace(TRAINING, concepts=(one[0] + "grandek",))
    with pytest.raises(ValueError, match=r"no word can be put for '\w+'; the last try: the texts have \d+ and \d+"):
        corrupt(item, 5, "last", longer, tokenizer=byte_tokens)
    with pytest.raises(ValueError, match="the lexicon has no other word"):
        corrupt(item, 5, "last", replace(TRAINING, concepts=()), tokenizer=byte_tokens)
    with pytest.raises(ValueError, match="begin with the same token"):
        twin = cut.word.text[:-1] + ("m" if cut.word.text[-1] != "m" else "n")
        corrupt(item, 5, "last", replace(TRAINING, concepts=(twin,)), tokenizer=byte_tokens)
    with pytest.raises(ValueError, match="are needed"):
        fit(replace(TRAINING, concepts=TRAINING.concepts[:5]), merging)


def test_fitted_items_of_one_shape_have_the_same_positions(merging) -> None:  # type: ignore[no-untyped-def]
    fitted = fit(TRAINING, merging)
    shapes = set()
    for item in generate(8, fitted, 2, 13, distractors="none", demonstrations=1):
        encoded = encode(merging, item.text[: item.cuts[-1].start])
        shapes.add((len(encoded), *(encoded.predicted(cut.span)[0] for cut in item.cuts[:-1])))
    assert len(shapes) == 1


def test_alignment_refuses_what_is_not_aligned() -> None:
    tokenizer = make_tokenizer(named=False)
    encoded = encode(tokenizer, "Sam is tall", special_tokens=True)
    assert encoded.ids[0] == 256 and encoded.first((0, 3)) == 1 and encoded.positions((4, 6)) == range(5, 7)
    assert len(encode(tokenizer, "Sam is tall")) == 11

    with pytest.raises(ValueError, match="the first token of 'is' is 's i', which begins in another word"):
        encode(lambda t: ([1, 2, 3], [(0, 1), (1, 4), (4, len(t))]), "as is").positions((3, 5))
    with pytest.raises(ValueError, match="reaches beyond the word"):
        encode(lambda t: ([1, 2], [(0, 4), (4, len(t))]), "as is x").positions((0, 2))
    with pytest.raises(ValueError, match="nothing predicts it"):
        encode(byte_tokens, "Sam is").predicted((0, 3))
    with pytest.raises(ValueError, match="must return"):
        encode(lambda t: [1, 2], "ab")
    a, b = encode(byte_tokens, "Sam is fast"), encode(byte_tokens, "Tom is loud")
    check_aligned(a, b, [((0, 3), (0, 3)), ((7, 11), (7, 11))])
    with pytest.raises(ValueError, match="differ at token 7, outside"):
        check_aligned(a, b, [((0, 3), (0, 3))])
    with pytest.raises(ValueError, match="11 and 10 tokens"):
        check_aligned(a, encode(byte_tokens, "Sam is bad"), [])
    assert single_token_words(["a", "bc", "a"], lambda text: [ord(c) for c in text], before="") == ["a"]


def test_lexicons_share_no_word_and_hold_no_published_one() -> None:
    for field in ("concepts", "entities", "properties"):
        assert not set(getattr(TRAINING, field)) & set(getattr(UNSEEN, field))
        for lexicon in LEXICONS.values():
            assert len(set(getattr(lexicon, field))) == len(getattr(lexicon, field))
    assert not [w for lexicon in (TRAINING, UNSEEN) for w in lexicon.concepts if re.search("pus$|blick|wug|dax", w)]
    assert {p for p in FALSE.properties} == set(FALSE.suits)
    train = {w for i in generate(50, TRAINING, 2) for w in i.ontology.words}
    assert not train & {w for i in generate(50, UNSEEN, 2, demonstrations=2) for w in i.ontology.words}


def test_relations_of_the_false_ontology_are_wrong() -> None:
    for item in generate(40, FALSE, 3, 1, distractors="relevant", demonstrations=0):
        for statement in item.ontology.statements:
            if statement.is_rule:
                assert FALSE.may_be(statement.subject.text, statement.object.text)
    assert not FALSE.may_be("cat", "furry") and not FALSE.may_be("cat", "dog") and FALSE.may_be("cat", "tree")


def test_seeds_balance_and_refusals() -> None:
    a, b, c = (generate(20, TRAINING, 2, seed, demonstrations=2) for seed in (0, 0, 1))
    assert a == b and a != c
    assert len({item.ontology for item in a}) == 20 and len({item.item_id for item in a}) == 20
    assert sum(item.ontology.answer for item in a) == 10
    for item in generate(6, TRAINING, 1):
        assert len(item.demonstrations) == 6 and sum(o.answer for o in item.demonstrations) == 3
        assert not item.ontology.words & {w for o in item.demonstrations for w in o.words}
    assert sorted(sum(answers(5, random.Random(s))) for s in range(20)) in ([2] * k + [3] * (20 - k) for k in range(21))
    for broken in ({"hops": 5}, {"hops": 0}, {"order": "sorted"}, {"distractors": "some"}, {"negation": "all"}):
        with pytest.raises(ValueError, match="must be"):
            draw(random.Random(0), TRAINING, **{"hops": 2, "answer": True, **broken})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generate(0, TRAINING)
    with pytest.raises(ValueError, match="too few"):
        draw(random.Random(0), TRAINING, 2, True, avoid=[Word(w, "concept") for w in TRAINING.concepts[3:]])


def test_pairs_are_restricted_and_balanced() -> None:
    texts = mixing_texts(12, TRAINING, 0)
    assert texts == mixing_texts(12, TRAINING, 0) != mixing_texts(12, TRAINING, 1)
    for found in texts:
        stated = {}
        for sentence in parse_sentences(found.text.strip().rstrip(".").split(". ")):
            assert sentence is not None
            stated[sentence.subject.text.lower(), sentence.object.text] = sentence.negated
        counts: dict[tuple[str, str], int] = {}
        for pair in found.pairs:
            first, second = found.text[slice(*pair.first_span)], found.text[slice(*pair.second_span)]
            assert first.lower() in (pair.first.text, plural_of(pair.first.text)) and first[0].isupper()
            assert second in (pair.second.text, plural_of(pair.second.text))
            told = {s.meaning[:2]: s.negated for s in found.statements}.get((pair.first, pair.second))
            assert {None: "unrelated", False: "edge", True: "negated"}[told] == pair.relation
            assert pair.first.kind == "concept" and pair.second.kind == pair.kind and pair.distance > 0
            counts[pair.relation, pair.kind] = counts.get((pair.relation, pair.kind), 0) + 1
        assert set(counts.values()) == {2} and len(counts) == 6
    words = {w for t in texts for p in t.pairs for w in (p.first.text, p.second.text)}
    assert not words & {w for t in mixing_texts(12, UNSEEN, 0) for p in t.pairs for w in (p.first.text, p.second.text)}
    with pytest.raises(ValueError, match="at least 1 text and 2 statements"):
        mixing_texts(1, TRAINING, per_relation=1)


def test_prontoqa_file() -> None:
    one, two = read_prontoqa(DATA / "prontoqa.json")
    assert one.ontology.hops == 2 and not one.ontology.answer and len(one.demonstrations) == 1
    assert one.prompt.endswith(
        "### Input: Grindles are not cold. Glimmet is snarp. Glimmet is loud. Snarps are bright. Polly is glimmet. "
        "True or false: Polly is not bright. Let us think step by step.\n### Response:"
    )
    assert one.completion == (
        " Polly is glimmet. Glimmet is snarp. Polly is snarp. Snarps are bright. Polly is bright. False"
    )
    assert [c.target for c in one.cuts[:6]] == ["Polly", "glimmet", "Glimmet", "snarp", "Polly", "snarp"]
    snarp = one.cuts[5].word
    assert snarp is not None and [one.text[slice(*m.span)] for m in one.mentions_of(snarp, "question")] == [
        "snarp", "Snarps",
    ]  # fmt: skip
    assert two.ontology.answer and two.ontology.hops == 1 and two.ontology.conclusion.negated


def test_prontoqa_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    record = json.loads((DATA / "prontoqa.json").read_text())["example2"]["test_example"]
    for content, message in (
        ("[]", "an object of examples"),
        ("{", "not valid JSON"),
        ('{"example1": {}}', "has no test_example"),
        (json.dumps({"e": {"test_example": {**record, "answer": "Maybe"}}}), "True or False, got 'Maybe'"),
        (json.dumps({"e": {"test_example": {**record, "query": "Well?"}}}), "not a sentence of the language: 'Well"),
        (json.dumps({"e": {"test_example": {**record, "chain_of_thought": ["Rex is a wog."]}}}), "must be a fact"),
        (json.dumps({"e": {"test_example": {"question": "x"}}}), "are needed"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_prontoqa(path)


def test_what_is_written_is_read_back() -> None:
    for item in generate(20, TRAINING, 3, 14, "shuffled", "relevant", "some", demonstrations=0):
        sentences = [*item.ontology.statements, item.ontology.query]
        parsed = parse_sentences([sentence_text(s) for s in sentences])
        assert parsed == sentences
