"""One problem: a question, its answer and everything an experiment may want to know about it.

Knows nothing about where problems come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.tasks.answers import COMMON, Reading

__all__ = ["Problem", "Uses"]

Uses = tuple[tuple[int, ...], ...]
"""For each step, for each figure of its left side, the number of the step whose result it is (0: none)."""


@dataclass(frozen=True)
class Problem:
    """A question with a known numeric answer.

    Attributes:
        prompt_id: unique within its task.
        question: the text that the model reads, without protocol tokens.
        answer: the correct answer.
        steps: equations of the written chain of thought, such as ("7+5=12", "12*3=36"); empty if unknown. A file gives
            them in its field `steps` (see experiments/tasks/readers).
        cluster: problems with the same value are not independent (they share their numbers); the unit of resampling.
        template: scene or wording family.
        operation: "addition", "subtraction", "add+bring", …; empty if unknown.
        numbers: the numbers in the question, in order; empty if unknown.
        intermediates: value of each step in order; empty if unknown.
        uses: which figures of the steps are results of earlier steps; empty if that is not known for certain.
        reading: how an answer to it is read from a text.
    """

    prompt_id: str
    question: str
    answer: int | float
    steps: tuple[str, ...] = ()
    cluster: str = ""
    template: str = ""
    operation: str = ""
    numbers: tuple[int, ...] = ()
    intermediates: tuple[int | float, ...] = ()
    uses: Uses = field(default=(), repr=False)
    reading: Reading = field(default=COMMON, compare=False, repr=False)

    @property
    def chain(self) -> str:
        """Written chain of thought, "<<7+5=12>><<12*3=36>>"; empty if the steps are unknown."""
        return "".join(f"<<{step}>>" for step in self.steps)

    def is_answered_by(self, text: str) -> bool:
        """Whether a text gives the answer."""
        return self.reading.agrees(text, self.answer)
