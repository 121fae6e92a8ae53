"""Three small problems with written chains, for the tests of training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    question: str
    chain: str
    answer_text: str


PROBLEMS = [
    Text("3+4, then 2 more?", "<<3+4=7>><<7+2=9>>", "9"),
    Text("9-2?", "<<9-2=7>>", "7"),
    Text("2*6 and again 5*3 in all?", "<<2*6=12>><<12+15=27>>", "27"),
]
