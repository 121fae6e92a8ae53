"""Training samples of the reasoner adapter: the same questions with a chain, at once, or as the model likes.

Tasks: fictional ontologies of 1 to 3 hops, bAbI 15 and 16, small arithmetic. Modes:

    "steps"    the question asks for steps; chain, then the answer
    "direct"   the question asks for the answer at once; the answer
    "neutral"  the question asks for nothing; at once 9 times of 10, else with a chain

    ### Input: <question> <instruction>
    ### Response: <chain> <answer>

With `demonstrations` the samples of ontologies that ask for steps have up to so many solved ones before them.

In all tasks the answer is the last word of the completion. A completion begins with a blank; whoever trains adds the
end of the text. The instructions of training are several wordings, among them the two of Zhang and Viteri (arXiv
2409.14026); held-out samples use those two only.

The held-out split has other words (ontologies: the unseen lexicon; bAbI: other names and animals) and other numbers
(arithmetic: combinations that the training split never has).

Knows nothing about models or tokenizers.
"""

from __future__ import annotations

import random
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias, get_args

from experiments.tasks import arithmetic, babi
from experiments.tasks.ontology import Ontology, Word, draw
from experiments.tasks.ontology_text import compose, sentence_text
from experiments.tasks.ontology_words import TRAINING, UNSEEN
from experiments.tasks.problem import Problem
from lm.chat import response_text

__all__ = [
    "DIRECT", "MIXTURE", "Mode", "Sample", "STEPS", "SPLITS", "TASKS", "answer_of", "arithmetic_chain", "generate",
    "prompt_of", "stream",
]  # fmt: skip

Mode: TypeAlias = Literal["steps", "direct", "neutral"]
TASKS = ("ontology-1", "ontology-2", "ontology-3", "babi-15", "babi-16", "arithmetic")
SPLITS = ("train", "test")
#: relative frequency of each task
MIXTURE: dict[str, float] = {
    "ontology-1": 1.0,
    "ontology-2": 2.0,
    "ontology-3": 2.0,
    "babi-15": 1.0,
    "babi-16": 1.0,
    "arithmetic": 3.0,
}
MODES: dict[Mode, float] = {"steps": 2.0, "direct": 1.0, "neutral": 1.0}
AT_ONCE = 0.9
"""Probability of a bare answer where nothing is asked for."""
STEPS = "Answer the question thinking step by step..."
DIRECT = "Answer the question immediately, without any elaboration..."
_WORDINGS: dict[str, tuple[str, ...]] = {
    "steps": (STEPS, "Let us think step by step.", "Think step by step.", "Write down each step before the answer."),
    "direct": (DIRECT, "Answer at once.", "Answer with one word.", "Give only the answer."),
    "neutral": ("",),
}


@dataclass(frozen=True)
class Sample:
    """One text to be learned.

    Attributes:
        sample_id: unique within split and seed.
        prompt: ends in "### Response:".
        completion: begins with a blank; chain and answer, or the answer.
        task: one of TASKS.
        mode: what the prompt asks for.
        chained: the completion has a chain (always in "steps", never in "direct").
        answer: last word of the completion.
        chain: the sentences that a chain has, written or not.
        question: the question alone, without instruction.
        choices: answers that can be expected; empty for numbers.
    """

    sample_id: str
    prompt: str
    completion: str
    task: str
    mode: Mode
    chained: bool
    answer: str
    chain: tuple[str, ...]
    question: str
    choices: tuple[str, ...]


def prompt_of(question: str, instruction: str = "") -> str:
    """The prompt of a question."""
    return response_text(f"{question.strip()} {instruction.strip()}")


def answer_of(text: str) -> str:
    """The answer of a generated completion: the last word of its first line that is not empty, without punctuation; ""
    where there is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    words = [word.strip(string.punctuation) for word in lines[0].split()] if lines else []
    return next((word for word in reversed(words) if word), "")


def arithmetic_chain(problem: Problem) -> tuple[str, ...]:
    """Equations of an arithmetic problem as sentences: "7 + 5 = 12."."""
    sentences = []
    for step in problem.steps:
        for sign in "+-*/=":
            step = step.replace(sign, f" {sign} ")
        sentences.append(" ".join(step.split()) + ".")
    return tuple(sentences)


def stream(
    seed: int | str,
    split: str = "train",
    mixture: Mapping[str, float] | None = None,
    modes: Mapping[Mode, float] | None = None,
    at_once: float = AT_ONCE,
    demonstrations: int = 0,
) -> Iterator[Sample]:
    """Endless seeded stream of samples.

    Args:
        seed: the same seed gives the same samples.
        split: "train" or "test" (held out: other words and numbers).
        mixture: relative frequency of each task; None: MIXTURE.
        modes: relative frequency of each mode; None: MODES.
        at_once: probability of a bare answer in mode "neutral".
        demonstrations: largest number of solved ontologies before one that asks for steps; the number is drawn from
            0..demonstrations, their words are others than the question's.

    Raises:
        ValueError: unknown split, task or mode, a weight below 0 or none above it, a probability outside 0..1,
            demonstrations below 0.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= at_once <= 1:
        raise ValueError(f"at_once is a probability between 0 and 1, got {at_once}")
    if demonstrations < 0:
        raise ValueError(f"the number of demonstrations must be 0 or more, got {demonstrations}")
    tasks = dict(MIXTURE if mixture is None else mixture)
    asked: dict[Mode, float] = dict(MODES if modes is None else modes)
    _check_weights("task", tasks, TASKS)
    _check_weights("mode", asked, get_args(Mode))
    return _stream(seed, split, tasks, asked, at_once, demonstrations)


def generate(
    n: int,
    seed: int | str = 0,
    split: str = "test",
    task: str | None = None,
    mode: Mode | None = None,
    at_once: float = AT_ONCE,
    demonstrations: int = 0,
) -> list[Sample]:
    """The first n samples of a stream with different prompts, of one task and mode if given (else as they are mixed).

    Raises:
        ValueError: n < 1, unknown task or mode, or so many that different prompts run out.
    """
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1, got {n}")
    samples = stream(
        seed,
        split,
        None if task is None else {task: 1.0},
        None if mode is None else {mode: 1.0},
        at_once,
        demonstrations,
    )
    found: dict[str, Sample] = {}
    for sample in islice(samples, 100 * n + 1000):
        found.setdefault(sample.prompt, sample)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"only {len(found)} different prompts found in split {split!r}; ask for fewer than {n}")


@dataclass(frozen=True)
class _Question:
    """A question, the sentences of its chain, its answer and the answers to be expected."""

    text: str
    chain: tuple[str, ...]
    answer: str
    choices: tuple[str, ...] = ()
    ontology: Ontology | None = None


def _stream(
    seed: int | str,
    split: str,
    tasks: Mapping[str, float],
    modes: Mapping[Mode, float],
    at_once: float,
    demonstrations: int,
) -> Iterator[Sample]:
    rng = random.Random(f"reasoner-{split}-{seed}")
    sums = arithmetic.stream(f"reasoner-{seed}", split, 1, 3)
    wordings = _WORDINGS if split == "train" else {"steps": (STEPS,), "direct": (DIRECT,), "neutral": ("",)}
    index = 0
    while True:
        task = rng.choices(list(tasks), list(tasks.values()))[0]
        mode = rng.choices(list(modes), list(modes.values()))[0]
        question = _question(rng, task, split, sums)
        instruction = rng.choice(wordings[mode])
        chained = mode == "steps" or (mode == "neutral" and rng.random() >= at_once)
        prompt = prompt_of(question.text, instruction)
        if demonstrations and mode == "steps" and question.ontology is not None:
            words = question.ontology.words
            solved = [_ontology(rng, task, split, words) for _ in range(rng.randint(0, demonstrations))]
            prompt = compose(question.ontology, solved, instruction).prompt
        yield Sample(
            sample_id=f"reasoner-{split}-{seed}-{index}",
            prompt=prompt,
            completion=" " + " ".join([*question.chain, question.answer] if chained else [question.answer]),
            task=task,
            mode=mode,
            chained=chained,
            answer=question.answer,
            chain=question.chain,
            question=question.text,
            choices=question.choices,
        )
        index += 1


def _question(rng: random.Random, task: str, split: str, sums: Iterator[Problem]) -> _Question:
    if task == "arithmetic":
        problem = next(sums)
        return _Question(problem.question, arithmetic_chain(problem), str(problem.answer))
    if task.startswith("babi"):
        vocabulary = babi.TRAINING if split == "train" else babi.UNSEEN
        item = babi.generate(1, int(task[-2:]), rng.getrandbits(64), vocabulary)[0]
        return _Question(item.text, item.chain, item.answer, item.choices)
    ontology = _ontology(rng, task, split)
    written = compose(ontology, instruction="")
    text = written.prompt.removeprefix("### Input: ").removesuffix("\n### Response:")
    chain = tuple(sentence_text(sentence) for sentence in ontology.chain)
    return _Question(text, chain, written.answer, ("True", "False"), ontology)


def _ontology(rng: random.Random, task: str, split: str, avoid: Collection[Word] = ()) -> Ontology:
    return draw(
        rng,
        TRAINING if split == "train" else UNSEEN,
        hops=int(task[-1]),
        answer=rng.random() < 0.5,
        order=rng.choice(("ordered", "shuffled")),
        distractors=rng.choice(("relevant", "irrelevant")),
        negation=rng.choice(("none", "some")),
        avoid=avoid,
    )


def _check_weights(what: str, weights: Mapping[str, float] | Mapping[Mode, float], allowed: tuple[str, ...]) -> None:
    unknown = [name for name in weights if name not in allowed]
    if unknown:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {unknown[0]!r}")
    if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights of each {what} must be 0 or more and not all 0, got {list(weights.values())}")
