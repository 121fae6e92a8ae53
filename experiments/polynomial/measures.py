"""What is measured on problems of one number of hops: which state is read where, and what hiding an input does.

Reads. A state is read from the residual stream at a place: h_0..h_n (0: begin of thought) or the end-of-thought token
(place n + 1). By lens: of the values 0..m-1 the one whose first token the plain logit lens gives most, at every layer;
by probe: a linear map fitted to other prompts (experiments/statistics/probes.py), at the last layer.

Hidden inputs. The tokens of one number of the question (the start, or input x_t) are hidden from all latents, or from
the end-of-thought token and the answer. Tokens after it in the prompt, begin of thought among them, still see it, and
may hand it on.

Trials: `reads` and `answers`, see READS and ANSWERS. Knows nothing about claims or words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import CodiModel, Intervention
from codi.forced import forced
from experiments.statistics.probes import probe
from experiments.study.answers import answer_table, trial_schema
from experiments.study.folder import TEXT
from experiments.study.parts import Workbench
from experiments.study.prompts import Asked
from experiments.study.rows import answer_rows
from experiments.study.spellings import number_spellings
from experiments.study.targets import design_of, targets_of
from experiments.study.thoughts import rollouts
from experiments.tasks import Problem
from experiments.tasks.alignment import encode
from lenses import LatentLens
from steering.replacements import HideSlots

__all__ = ["ANSWERS", "READERS", "READS", "answers", "hidden_columns", "reads"]

READS = pa.schema({
    "side": TEXT, "hops": pa.int16(), "state": pa.int16(), "method": TEXT, "place": pa.int16(), "layer": pa.int16(),
    "prompt_id": TEXT, "cluster": TEXT, "read": pa.float64(),
})  # fmt: skip
"""side: evaluation or derivation; state: 1..hops, the last is the answer; method: lens or probe; place: latent 0..n, or
n + 1: end of thought; read: 1 if the value that is read is the state, else 0."""
READERS = ("latents", "answer")
ANSWERS = trial_schema(hops=pa.int16(), number=pa.int16(), reader=pa.string())
"""number: which number of the question is hidden (0: the start, t: input x_t; -1: none); from which of READERS ("")."""


# --- Reads ------------------------------------------------------------------------------------------------------------


def reads(
    bench: Workbench, *, asked: Asked, hops: int, values: int, folds: int, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of the reads of one number of hops, see READS.

    Args:
        bench: model and prompts.
        asked: which of the prompts.
        hops: their number of hops.
        values: states are 0..values - 1.
        folds: of the probes.
        batch_size: prompts at once.
        seed: of the folds.
    """
    model = bench.model
    sides = {
        "evaluation": bench.prompts.evaluation[slice(*asked.evaluation)],
        "derivation": bench.prompts.derivation[slice(*asked.derivation)],
    }
    frames = []
    for side, problems in sides.items():
        named, last = [], []
        for states in _states(bench, model, problems, batch_size, f"{hops} hops, {side}"):
            named.append(_named(model, states, values))
            last.append(states[:, :, -1].float().cpu().numpy())
        frames += _lens_rows(problems, np.concatenate(named), side, hops)
        frames += _probe_rows(problems, np.concatenate(last), side, hops, folds, seed)
    return pd.concat(frames, ignore_index=True)


def _states(
    bench: Workbench, model: CodiModel, problems: Sequence[Problem], batch_size: int, label: str
) -> Iterator[Tensor]:
    """States of batches, in order: (row, place 0..n + 1, layer 0..n_layers, d_model)."""
    with bench.bar(len(problems), "prompt", label) as advance:
        for start in range(0, len(problems), batch_size):
            chunk = problems[start : start + batch_size]
            for run, _ in rollouts(model, chunk, model.n_latents, ("hidden_states", "cache")):
                assert run.hidden_states is not None and run.bot_hidden_states is not None
                _, _, end, _ = forced(model, run, [[] for _ in range(len(run))], hidden_states=True)
                assert end is not None
                yield torch.cat((run.bot_hidden_states[:, None], run.hidden_states, end[:, None]), dim=1)
                advance(len(run))


@torch.no_grad()
def _named(model: CodiModel, states: Tensor, values: int) -> np.ndarray:
    """(row, place, layer) the value that the logit lens gives most of 0..values - 1."""
    spelled = [sorted({ids[0] for ids in number_spellings(model.tokenizer, value)}) for value in range(values)]
    width = max(map(len, spelled))
    table = torch.tensor([ids + ids[-1:] * (width - len(ids)) for ids in spelled], device=states.device)
    lens = LatentLens.plain(model)
    found = np.empty(states.shape[:3], np.int16)
    for place in range(states.shape[1]):
        for layer in range(states.shape[2]):
            logits = lens.logits(states[:, place, layer], layer, place)
            found[:, place, layer] = logits[:, table].amax(-1).argmax(-1).cpu().numpy()
    return found


def _lens_rows(problems: Sequence[Problem], named: np.ndarray, side: str, hops: int) -> list[pd.DataFrame]:
    truth = np.array([problem.intermediates for problem in problems])
    places, layers = named.shape[1:]
    return [
        _frame(problems, side, hops, state, "lens", place, layer, named[:, place, layer] == truth[:, state - 1])
        for state in range(1, hops + 1)
        for place in range(places)
        for layer in range(layers)
    ]


def _probe_rows(
    problems: Sequence[Problem], last: np.ndarray, side: str, hops: int, folds: int, seed: int
) -> list[pd.DataFrame]:
    """Probes of every state at every place, last layer; a state that is always the same is not probed."""
    states = {"answer": hops} | {f"step{i}": i for i in range(1, hops)}
    wanted = [target for target in targets_of(problems) if target.name in states]
    if not wanted:
        return []
    design = design_of(problems, folds, 1, seed, targets=wanted)
    frames = []
    for place in range(last.shape[1]):
        for name, correct in probe(last[:, place], design).correct.items():
            frames.append(_frame(problems, side, hops, states[name], "probe", place, -1, correct))
    return frames


def _frame(
    problems: Sequence[Problem], side: str, hops: int, state: int, method: str, place: int, layer: int, read: np.ndarray
) -> pd.DataFrame:
    ids, clusters = [problem.prompt_id for problem in problems], [problem.cluster for problem in problems]
    given = {"side": side, "hops": hops, "state": state, "method": method, "place": place, "layer": layer}
    return pd.DataFrame({**given, "prompt_id": ids, "cluster": clusters, "read": np.asarray(read, float)})


# --- Hidden inputs ----------------------------------------------------------------------------------------------------


def hidden_columns(model: CodiModel, problems: Sequence[Problem], width: int, lengths: Sequence[int]) -> Tensor:
    """Where the numbers of the questions stand in the padded prompts.

    Args:
        model: for its tokenizer.
        problems: of one number of hops; a question tells its start first, then input and constant of every hop.
        width: of the padded prompts.
        lengths: tokens of each prompt, the protocol's with them.

    Returns:
        (prompt, number 0..hops, token) columns; -1 where a number has fewer tokens.
    """
    found = []
    for problem, length in zip(problems, lengths, strict=True):
        tokens = encode(model.tokenizer, problem.question, special_tokens=True)
        spans = [match.span() for match in re.finditer(r"\d+", problem.question)]
        chosen = [spans[0], *(spans[1 + 2 * hop] for hop in range(len(problem.numbers) - 1))]
        found.append([[width - length + i for i in tokens.positions(span)] for span in chosen])
    most = max(len(columns) for row in found for columns in row)
    return torch.tensor([[columns + [-1] * (most - len(columns)) for columns in row] for row in found])


def answers(
    bench: Workbench, *, asked: Asked, hops: int, hidden: int, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of answers with numbers of the question hidden, see ANSWERS. Nothing is drawn.

    Args:
        bench: model and prompts.
        asked: which of the prompts.
        hops: their number of hops.
        hidden: on how many of them numbers are hidden; the others are only answered.
        max_new_tokens, batch_size: of the decoding.
        seed: not used.
    """
    model, n = bench.model, bench.model.n_latents
    problems = bench.prompts.evaluation[slice(*asked.evaluation)]
    frames = []
    for start in range(0, len(problems), batch_size):
        chunk = problems[start : start + batch_size]
        prefill = model.prefill(model.encode([problem.question for problem in chunk]), keep=())
        width = prefill.attention_mask.shape[1]
        columns = hidden_columns(model, chunk, width, prefill.prompt_lengths.tolist())
        tried = [
            (i, number, reader)
            for i in range(len(chunk))
            for number, reader in [
                (-1, ""),
                *((t, who) for t in range(hops + 1) for who in READERS if start + i < hidden),
            ]
        ]
        row, number = torch.tensor([one[0] for one in tried]), torch.tensor([one[1] for one in tried])
        where = torch.where((number < 0)[:, None], -1, columns[row, number.clamp(min=0)])
        by_latents = torch.tensor([one[2] == "latents" for one in tried])

        def edits(
            here: Tensor, where: Tensor = where, by_latents: Tensor = by_latents, width: int = width
        ) -> Sequence[Intervention]:
            found: list[Intervention] = []
            for token in range(where.shape[1]):
                for reader in range(1, n + 2):
                    mine = by_latents[here] if reader <= n else ~by_latents[here]
                    column = torch.where(mine, where[here, token], -1)
                    found.append(HideSlots(column, torch.full_like(column, reader), width))
            return found

        texts = answer_rows(model, prefill, row, edits, max_new_tokens=max_new_tokens, batch_size=batch_size)
        given = {"hops": hops, "number": number.numpy(), "reader": [one[2] for one in tried]}
        frames.append(answer_table(chunk, row, texts, **given))
    return pd.concat(frames, ignore_index=True)
