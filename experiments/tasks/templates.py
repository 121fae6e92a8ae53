"""The template set: 10 scenes × addition or subtraction first, answer (X±Y)·Z + (X±Y), every intermediate value known.

It has the structure of the published prompt set (20 story templates; step1 = X±Y, step2 = step1·Z, answer = step1 +
step2; X, Y, Z in 1..8 with X > Y; 224 number triples shuffled with numpy seed 42) in this project's own words. Prompts
that share a triple are one cluster, whatever their scene and operation: there are only 224 independent triples.

Knows nothing about tokenizers, models or files.
Source of the structure: Cywiński et al., "Can we interpret latent reasoning using current mechanistic interpretability
tools?"
"""

from __future__ import annotations

import numpy as np

from experiments.tasks.problem import Problem

__all__ = ["SCENES", "corpus_sentences", "generate", "triples"]

# each scene: (addition story, subtraction story)
SCENES: tuple[tuple[str, str], ...] = tuple(
    (
        f"{start} {more} Then each {item} brings {{z}} others. {end}",
        f"{start} {less} Then each {item} brings {{z}} others. {end}",
    )
    for start, more, less, item, end in (
        (
            "There are {x} birds in the garden.",
            "Then {y} more arrive.",
            "Then {y} leave.",
            "bird",
            "How many birds are there now?",
        ),
        (
            "At the market we count {x} boxes.",
            "{y} new boxes are added.",
            "{y} boxes are taken away.",
            "box",
            "How many boxes in the end?",
        ),
        (
            "Ada keeps {x} hens on the farm.",
            "Ada adds {y} more.",
            "Ada removes {y} of them.",
            "hen",
            "How many hens are there now?",
        ),
        (
            "There are {x} books in the library.",
            "{y} new books are added.",
            "{y} books are taken away.",
            "book",
            "What is the number of books now?",
        ),
        (
            "At the harbour we count {x} boats.",
            "Then {y} more arrive.",
            "Then {y} leave.",
            "boat",
            "How many boats are there now?",
        ),
        (
            "Ben keeps {x} lamps in the shop.",
            "Ben adds {y} more.",
            "Ben removes {y} of them.",
            "lamp",
            "How many lamps in the end?",
        ),
        (
            "There are {x} pupils at the school.",
            "Then {y} more arrive.",
            "Then {y} leave.",
            "pupil",
            "How many pupils are there now?",
        ),
        (
            "In the forest we count {x} deer.",
            "{y} new deer are added.",
            "{y} deer are taken away.",
            "deer",
            "What is the number of deer now?",
        ),
        (
            "There are {x} guests at the theatre.",
            "Then {y} more arrive.",
            "Then {y} leave.",
            "guest",
            "How many guests in the end?",
        ),
        (
            "Eva keeps {x} sheep in the valley.",
            "Eva adds {y} more.",
            "Eva removes {y} of them.",
            "sheep",
            "How many sheep are there now?",
        ),
    )
)


def triples() -> list[tuple[int, int, int]]:
    """All 224 number triples (X, Y, Z in 1..8, X > Y) in the published order (numpy seed 42)."""
    every = [(x, y, z) for x in range(1, 9) for y in range(1, 9) for z in range(1, 9) if x > y]
    order = np.random.RandomState(42).permutation(len(every))
    return [every[i] for i in order]


def generate(n: int | None = None, seed: int = 0, split: str = "test") -> list[Problem]:
    """Template problems of one split.

    Args:
        n: at most so many problems, drawn without replacement and returned in a fixed order; None: all of the split.
        seed: of that draw.
        split: "test" = the first 112 triples, "derivation" = the other 112 (no triple in common), "all" = 224.

    Returns:
        Problems with intermediates (step1, step2, answer); operation "addition" or "subtraction"; template "00".."09".

    Raises:
        ValueError: unknown split, or n outside 1..(size of the split).
    """
    chosen = {"test": slice(0, 112), "derivation": slice(112, 224), "all": slice(0, 224)}
    if split not in chosen:
        raise ValueError(f"split must be one of {', '.join(chosen)}, got {split!r}")
    problems = []
    for x, y, z in triples()[chosen[split]]:
        for scene, stories in enumerate(SCENES):
            for operation, sign, story in zip(("addition", "subtraction"), (1, -1), stories, strict=True):
                step1 = x + sign * y
                step2 = step1 * z
                problems.append(
                    Problem(
                        prompt_id=f"templates-{x}-{y}-{z}-{scene:02d}-{operation}",
                        question=story.format(x=x, y=y, z=z),
                        answer=step1 + step2,
                        steps=(
                            f"{x}{'+' if sign > 0 else '-'}{y}={step1}",
                            f"{step1}*{z}={step2}",
                            f"{step1}+{step2}={step1 + step2}",
                        ),
                        cluster=f"{x},{y},{z}",
                        template=f"{scene:02d}",
                        operation=operation,
                        numbers=(x, y, z),
                        intermediates=(step1, step2, step1 + step2),
                        uses=((0, 0), (1, 0), (1, 2)),
                    )
                )
    if n is None:
        return problems
    if not 1 <= n <= len(problems):
        raise ValueError(f"the number of problems must be in 1..{len(problems)} for split {split!r}, got {n}")
    keep = np.sort(np.random.default_rng(seed).permutation(len(problems))[:n])
    return [problems[i] for i in keep]


def corpus_sentences() -> list[str]:
    """The stories with their numbers left out: part of what the shipped tokenizer is trained on."""
    return [" " + story.format(x="", y="", z="") for pair in SCENES for story in pair]
