"""Training problems as token ids: where results stand, and the tokens of single steps."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
from training_problems import PROBLEMS, Text

from codi import CodiModel
from codi.batches import _step_ends, collate


def test_a_chain_counts_only_if_every_result_begins_a_token() -> None:
    class Tokenizer:
        """One token per character, except that "=7" is one."""

        is_fast = True

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            pieces = re.findall(r"=7|.", text)
            ends = list(itertools.accumulate(map(len, pieces)))
            return {"offset_mapping": list(zip([0, *ends[:-1]], ends, strict=True)) if pieces else []}

    chains = ["", "<<1+1=2>>", "<<1+1=2>><<2+5=7>>", "<<1+1=2>><<2+1=3>>"]
    assert _step_ends(Tokenizer(), chains, 10).tolist() == [[-1, -1], [15, -1], [-1, -1], [15, 24]]


def test_the_tokens_of_single_steps(tiny_model: Callable[..., CodiModel]) -> None:
    model = tiny_model()
    batch = collate([*PROBLEMS, Text("5?", "", "5")], model, steps=True)
    assert batch.step_ids is not None and batch.step_mask is not None
    for row, problem in enumerate(PROBLEMS):
        steps = re.findall("<<.*?>>", problem.chain)
        for k in range(batch.step_ids.shape[1]):
            text = model.tokenizer.decode(batch.step_ids[row, k][batch.step_mask[row, k]])
            assert text == (steps[k] if k < len(steps) else "")
    assert not batch.step_mask[-1].any()
    assert collate(PROBLEMS, model).step_ids is None  # only where they are asked for
    empty = collate([Text("5?", "", "5")], model, steps=True)
    assert empty.step_mask is not None and not empty.step_mask.any()


def test_no_problems(tiny_model: Callable[..., CodiModel]) -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        collate([], tiny_model())
