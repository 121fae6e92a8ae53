"""What lenses read on every prompt, as arrays and as the typed trial tables of `codi lens detect`.

    readings    lens × prompt × latent × layer × target: rank of the value, and its chance level for k = 1..TOP
    states      lens × prompt × latent × layer: entropy, divergence, whether the first token is a number
    words       lens × prompt × latent × layer × word family: rank
    values      lens × prompt × answer value: share of latents × layers that read it

In a table, rank 0 is "not among the TOP" and −1 "the prompt has no such target". Rows are in the order of these axes.
Knows nothing about models or statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.lens.options import TOP
from experiments.study.spellings import NEVER

__all__ = ["READINGS", "STATES", "VALUES", "WORDS", "Detection"]

_PROMPT = {"lens": pa.string(), "prompt_id": pa.string(), "cluster": pa.string()}
_PLACE = {**_PROMPT, "latent": pa.int16(), "layer": pa.int16()}
CHANCES = tuple(f"chance_{k}" for k in range(1, TOP + 1))
READINGS = pa.schema(
    {
        **_PLACE,
        "right": pa.bool_(),
        "target": pa.string(),
        "several_tokens": pa.bool_(),
        "rank": pa.int16(),
        **dict.fromkeys(CHANCES, pa.float32()),
    }
)
"""right: the model's own answer; several_tokens: of every spelling of the value; chance_k: null without a donor."""
STATES = pa.schema({**_PLACE, "entropy": pa.float32(), "divergence": pa.float32(), "number_first": pa.bool_()})
"""entropy and divergence (KL(output ‖ lens)) in nats."""
WORDS = pa.schema({**_PLACE, "word": pa.string(), "rank": pa.int16(), "single_token_spellings": pa.int16()})
VALUES = pa.schema(
    {**_PROMPT, "value": pa.float64(), "is_answer": pa.bool_(), "is_own": pa.bool_(), "read": pa.float32()}
)
"""is_answer: it is the prompt's answer; is_own: answer or intermediate value of the prompt."""


@dataclass(frozen=True)
class Detection:
    """What lenses read on every prompt.

    Attributes:
        prompt_ids, clusters: (prompt,).
        lenses: names of the lenses, first axis of the arrays.
        positions: 0..n, third axis.
        targets: names, last axis of `rank`.
        right: (prompt,) whether the model's own answer is right.
        multi_token: (prompt, target) whether every spelling of the target has several tokens.
        rank: (lens, prompt, position, layer, target) 1..TOP, NEVER: not among them, 0: the prompt has no such target.
        chance: (lens, prompt, position, layer, target, k) share of donors whose value is read with k; NaN: no donor.
        entropy: (lens, prompt, position, layer) nats.
        divergence: (lens, prompt, position, layer) KL(output ‖ lens) nats.
        number_first: (lens, prompt, position, layer) whether the most probable token is a number.
        words: names of word families; word_rank (lens, prompt, position, layer, word); single_token_spellings per word.
        values: (value,) every value that is the answer of some prompt, ascending; is_answer, is_own (prompt, value).
        reads: (lens, prompt, value) share of latents 1..n × layers with the value among the k most probable tokens.
    """

    prompt_ids: np.ndarray
    clusters: np.ndarray
    lenses: tuple[str, ...]
    positions: tuple[int, ...]
    targets: tuple[str, ...]
    right: np.ndarray
    multi_token: np.ndarray
    rank: np.ndarray
    chance: np.ndarray
    entropy: np.ndarray
    divergence: np.ndarray
    number_first: np.ndarray
    words: tuple[str, ...]
    word_rank: np.ndarray
    single_token_spellings: tuple[int, ...]
    values: np.ndarray
    is_answer: np.ndarray
    is_own: np.ndarray
    reads: np.ndarray

    @property
    def n_layers(self) -> int:
        """The last layer, at which every lens is the model."""
        return self.rank.shape[3] - 1

    # --- As trial tables ---

    def readings(self) -> pd.DataFrame:
        """The table `readings`."""
        columns, (_, prompt, _, _, target) = self._columns(self.rank.shape)
        rank = self.rank.reshape(-1)
        columns |= {
            "right": self.right[prompt],
            "target": np.array(self.targets)[target],
            "several_tokens": self.multi_token[prompt, target],
            "rank": np.select([rank == 0, rank == NEVER], [-1, 0], rank),
        }
        chance = self.chance.reshape(-1, TOP)
        return pd.DataFrame(columns | {name: chance[:, k] for k, name in enumerate(CHANCES)})

    def states(self) -> pd.DataFrame:
        """The table `states`."""
        columns, _ = self._columns(self.entropy.shape)
        measured = {name: getattr(self, name).reshape(-1) for name in ("entropy", "divergence", "number_first")}
        return pd.DataFrame(columns | measured)

    def word_readings(self) -> pd.DataFrame:
        """The table `words`."""
        columns, (*_, word) = self._columns(self.word_rank.shape)
        rank = self.word_rank.reshape(-1)
        columns |= {
            "word": np.array(self.words, dtype=object)[word],
            "rank": np.where(rank == NEVER, 0, rank),
            "single_token_spellings": np.array(self.single_token_spellings)[word],
        }
        return pd.DataFrame(columns)

    def value_readings(self) -> pd.DataFrame:
        """The table `values`."""
        lens, prompt, value = (axis.reshape(-1) for axis in np.indices(self.reads.shape))
        return pd.DataFrame(
            {
                "lens": np.array(self.lenses, dtype=object)[lens],
                "prompt_id": self.prompt_ids[prompt],
                "cluster": self.clusters[prompt],
                "value": self.values[value],
                "is_answer": self.is_answer[prompt, value],
                "is_own": self.is_own[prompt, value],
                "read": self.reads.reshape(-1),
            }
        )

    def _columns(self, shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """Columns that say which row it is, and the index of every row along each axis."""
        axes = [axis.reshape(-1) for axis in np.indices(shape)]
        lens, prompt, position, layer = axes[:4]
        columns = {
            "lens": np.array(self.lenses, dtype=object)[lens],
            "prompt_id": self.prompt_ids[prompt],
            "cluster": self.clusters[prompt],
            "latent": np.array(self.positions)[position],
            "layer": layer,
        }
        return columns, axes

    @classmethod
    def from_tables(cls, tables: Mapping[str, pd.DataFrame]) -> Detection:
        """The arrays of trial tables."""
        readings, states, values = (tables[name] for name in ("readings", "states", "values"))
        words = tables.get("words", pd.DataFrame(columns=WORDS.names))
        lenses, positions, targets = (tuple(readings[name].unique()) for name in ("lens", "latent", "target"))
        layers, families, every = readings["layer"].nunique(), tuple(words["word"].unique()), values["value"].unique()
        n = len(readings) // (len(lenses) * len(positions) * layers * len(targets))
        shape = (len(lenses), n, len(positions), layers)

        def reshaped(column: pd.Series, *last: int) -> np.ndarray:
            return column.to_numpy().reshape(*shape, *last)

        rank = reshaped(readings["rank"], len(targets))
        word_rank = reshaped(words["rank"], len(families))
        of_prompt = readings.iloc[: n * len(positions) * layers * len(targets) : len(positions) * layers * len(targets)]
        several = reshaped(readings["several_tokens"], len(targets))
        of_value = (len(lenses), n, len(every))
        return cls(
            prompt_ids=of_prompt["prompt_id"].to_numpy(object),
            clusters=of_prompt["cluster"].to_numpy(object),
            lenses=lenses,
            positions=tuple(map(int, positions)),
            targets=targets,
            right=of_prompt["right"].to_numpy(bool),
            multi_token=several[0, :, 0, 0],
            rank=np.select([rank == -1, rank == 0], [0, NEVER], rank),
            chance=np.stack([reshaped(readings[name], len(targets)) for name in CHANCES], axis=-1),
            entropy=reshaped(states["entropy"]),
            divergence=reshaped(states["divergence"]),
            number_first=reshaped(states["number_first"]).astype(bool),
            words=families,
            word_rank=np.where(word_rank == 0, NEVER, word_rank),
            single_token_spellings=tuple(
                words.groupby("word", sort=False)["single_token_spellings"].first().astype(int)
            ),
            values=every,
            is_answer=values["is_answer"].to_numpy(bool).reshape(of_value)[0],
            is_own=values["is_own"].to_numpy(bool).reshape(of_value)[0],
            reads=values["read"].to_numpy().reshape(of_value),
        )
