"""Accuracies that others reported for the published checkpoints, each with its source. Data alone.

Only what could be read at its source, or where somebody quotes it beside a run of his own, stands here. What could not
is named in LEFT_OUT: no figure is filled in from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LEFT_OUT", "REPORTED", "SAME", "Reported"]

SAME = 0.05
"""An accuracy whose whole interval lies within this of a reported one (five points) counts as the same."""


@dataclass(frozen=True)
class Reported:
    """An accuracy that somebody reported.

    Attributes:
        model: hub id of the checkpoint, or of that which a paper's model was released as.
        data: name of the data set (studies.DATA_SETS).
        accuracy: fraction of the test set.
        source: where it stands.
        paper: it is the figure of the paper; False: another run of the same checkpoint.
    """

    model: str
    data: str
    accuracy: float
    source: str
    paper: bool = True


_GPT2 = "zen-E/CODI-gpt2"
_QUOTED = "Shen et al. 2025, arXiv 2502.21074, as quoted in github.com/zhenyi4/codi, issue 17"
_RERUN = "github.com/GusSand/CoT_Exploration, docs/experiments/codi_gsm8k_reproduction_2025-10-16.md (569 of 1,319)"
REPORTED: tuple[Reported, ...] = (
    Reported(_GPT2, "gsm8k", 0.437, _QUOTED),
    Reported(_GPT2, "svamp", 0.429, _QUOTED),
    Reported(_GPT2, "gsm-hard", 0.099, _QUOTED),
    Reported(_GPT2, "multiarith", 0.928, _QUOTED),
    Reported(_GPT2, "gsm8k", 0.4314, _RERUN, paper=False),
)

LEFT_OUT = (
    "zen-E/CODI-llama3.2-1b-Instruct: no page could be read that has the paper's table, and those that quote it do not "
    "agree (GSM8K 44.1 % in github.com/zhenyi4/codi, issue 17, elsewhere about 56.7 %). A public evaluation of this "
    "checkpoint found 55.4 % on GSM8K (731 of 1,319, October 2025).",
    "bcywinski/codi_llama1b-answer_only: no reported accuracy on these data sets was found.",
)
"""Figures that were looked for and not found, in sentences."""
