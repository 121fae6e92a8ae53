"""What lenses say about problems whose values are known: detection, entropy, words, differences, transfer, causes.

Pure functions from a model, lenses and problems to tables; every rate has an interval by bootstrap over clusters.

Detection: a value counts as read at (latent, layer) with k if it is among the k most probable tokens there. A number is
spelled with and without a leading space, tokens that are only space are skipped, and the better spelling counts. A
number of several tokens counts by its first token (rule "first") or only if all of its tokens are among the k (rule
"all"); single-token numbers are the same under both. Chance level beside every rate: the same reading for the values of
`donors` other prompts (same step of the story; a donor's value that is one of the prompt's own values is left out).

Targets: step1, step2, … = values of the written chain before the last; "steps" = any of them; "answer"; "question" =
any number that the question itself holds (what a lens reads by copying).

Knows nothing about files, figures or the command line (experiments/lens.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from codi.decode import decode_answers
from experiments.statistics.clusters import Settings, mean_intervals
from experiments.tasks import Problem, is_correct
from lenses.causal import AblateDirections, causal_basis, energies
from lenses.latent_lens import TEXT, LatentLens, latent_states
from lenses.training import collect_states, divergence_to_output

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = [
    "TOP",
    "Detection",
    "causal_effects",
    "detect",
    "difference_table",
    "latent_means",
    "number_spellings",
    "read_prompt",
    "transfer_table",
    "value_frequencies",
    "word_spellings",
]

TOP = 10
"""Detection is computed for k = 1..TOP."""
Rule = Literal["first", "all"]
_NEVER = 127  # rank of what is not among the TOP


def batches(problems: Sequence[Problem], size: int) -> Iterator[list[int]]:
    """Indices of problems of similar length, at most `size` at once."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))
    for start in range(0, len(order), size):
        yield order[start : start + size]


# --- Spellings --------------------------------------------------------------------------------------------------------


def _spellings(tokenizer: Any, forms: Iterable[str]) -> list[tuple[int, ...]]:
    found = []
    for form in forms:
        ids = list(tokenizer(form, add_special_tokens=False)["input_ids"])
        while len(ids) > 1 and not tokenizer.decode([ids[0]]).strip():
            ids = ids[1:]  # a space that is a token of its own says nothing about the number
        if ids:
            found.append(tuple(ids))
    return list(dict.fromkeys(found))


def number_spellings(tokenizer: Any, value: int | float) -> list[tuple[int, ...]]:
    """Token ids of a number, without and with a leading space, without duplicates."""
    text = str(int(value)) if float(value).is_integer() else f"{value:g}"
    return _spellings(tokenizer, (text, " " + text))


def word_spellings(tokenizer: Any, word: str) -> list[tuple[int, ...]]:
    """Token ids of a word with and without leading space and capital."""
    return _spellings(tokenizer, (word, " " + word, word.capitalize(), " " + word.capitalize()))


def _table(spellings: Sequence[Sequence[tuple[int, ...]]], rule: Rule) -> Tensor:
    """(value, spelling, token) ids, −1 where there is none; one token per spelling under rule "first"."""
    shortened = [[ids[:1] if rule == "first" else ids for ids in forms] for forms in spellings]
    n_forms = max(map(len, shortened))
    n_tokens = max(len(ids) for forms in shortened for ids in forms)
    table = torch.full((len(shortened), n_forms, n_tokens), -1)
    for i, forms in enumerate(shortened):
        for j, ids in enumerate(forms):
            table[i, j, : len(ids)] = torch.tensor(ids)
    return table


def ranks(top: Tensor, wanted: Tensor) -> Tensor:
    """Rank of spelled values among the most probable tokens.

    Args:
        top: (row, k) token ids, most probable first.
        wanted: (row, value, spelling, token) ids, −1 where there is none.

    Returns:
        (row, value) int64: 1..k, the best spelling's worst token; _NEVER if no spelling is wholly among the k.
    """
    equal = wanted[..., None] == top[:, None, None, None, :]
    place = torch.where(equal.any(-1), equal.int().argmax(-1) + 1, _NEVER)
    absent = wanted == -1
    place = place.masked_fill(absent, 0).amax(dim=-1)  # worst token of a spelling; padding never is
    place = place.masked_fill(absent.all(dim=-1), _NEVER)
    return place.amin(dim=-1)


# --- Detection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detection:
    """What lenses read on every prompt.

    Attributes:
        problems: the prompts.
        lenses: names of the lenses, first axis of the arrays.
        positions: 0..n, third axis.
        targets: names, last axis of `rank`.
        right: (prompt,) whether the model's own answer is right.
        multi_token: (prompt, target) whether every spelling of the target has several tokens.
        rank: (lens, prompt, position, layer, target) 1..TOP, 127: not among them, 0: the prompt has no such target.
        chance: (lens, prompt, position, layer, target, k) share of donors whose value is read with k; NaN: no donor.
        entropy: (lens, prompt, position, layer) nats.
        divergence: (lens, prompt, position, layer) KL(output ‖ lens) nats.
        number_first: (lens, prompt, position, layer) whether the most probable token is a number.
        words: names of word families; word_rank (lens, prompt, position, layer, word); single_token_spellings per word.
        values, reads: (value,), and (lens, prompt, value) share of latents 1..n × layers with the value among the
            `frequency_k` most probable tokens.
    """

    problems: tuple[Problem, ...]
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
    reads: np.ndarray
    frequency_k: int

    @property
    def clusters(self) -> list[str]:
        return [problem.cluster or problem.prompt_id for problem in self.problems]

    def rates(self, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Detection rates: one row per lens × latent × layer × target × answered × k.

        Columns: rate, lower, upper, chance, lift (rate − chance, paired) with lift_lower and lift_upper, n, n_clusters,
        multi_token (share of the targets). answered: "all", or prompts that the model answered "right" / "wrong".
        """
        frames, settings = [], Settings(resamples=resamples, seed=seed)
        groups = {"all": np.ones(len(self.right), bool), "right": self.right, "wrong": ~self.right}
        for answered, chosen in groups.items():
            if not chosen.any() or (answered != "all" and chosen.all()):
                continue
            for i, lens in enumerate(self.lenses):
                rank = self.rank[i][chosen]  # prompt, position, layer, target
                known = rank > 0
                hits = np.stack([np.where(known, rank <= k, np.nan) for k in range(1, TOP + 1)], axis=-1)
                chance = np.where(known[..., None], self.chance[i][chosen], np.nan)
                clusters = [cluster for cluster, use in zip(self.clusters, chosen, strict=True) if use]
                flat = (len(hits), -1)
                found = mean_intervals(hits.reshape(flat), clusters, settings, rates=True)
                both = mean_intervals((hits - chance).reshape(flat), clusters, settings, bounds=(-1.0, 1.0))
                index = pd.MultiIndex.from_product(
                    [self.positions, range(rank.shape[2]), self.targets, range(1, TOP + 1)],
                    names=["latent", "layer", "target", "k"],
                )
                frame = index.to_frame(index=False)
                frame.insert(0, "lens", lens)
                frame.insert(4, "answered", answered)
                frame["rate"], frame["lower"], frame["upper"] = found["mean"], found["lower"], found["upper"]
                frame["chance"] = (found["mean"] - both["mean"]).to_numpy()
                frame["lift"], frame["lift_lower"], frame["lift_upper"] = both["mean"], both["lower"], both["upper"]
                frame["n"], frame["n_clusters"] = found["n"], found["n_clusters"]
                several = np.where(self.rank[0, :, 0, 0] > 0, self.multi_token, np.nan)[chosen]
                share = dict(zip(self.targets, _column_means(several), strict=True))
                frame["multi_token"] = frame["target"].map(share)
                frames.append(frame[frame["n"] > 0])
        return pd.concat(frames, ignore_index=True)

    def word_rates(self, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Word families: one row per lens × latent × layer × word × k, with rate, lower, upper, n, n_clusters.

        A spelling of several tokens counts only if all of them are among the k; single_token_spellings says how many
        of the (up to four) spellings are one token: with 0 a family is hardly readable in this vocabulary at all.
        """
        frames, settings = [], Settings(resamples=resamples, seed=seed)
        for i, lens in enumerate(self.lenses):
            hits = np.stack([self.word_rank[i] <= k for k in range(1, TOP + 1)], axis=-1).astype(float)
            frame = pd.MultiIndex.from_product(
                [self.positions, range(hits.shape[2]), self.words, range(1, TOP + 1)],
                names=["latent", "layer", "word", "k"],
            ).to_frame(index=False)
            frame.insert(0, "lens", lens)
            found = mean_intervals(hits.reshape(len(hits), -1), self.clusters, settings, rates=True)
            frame["rate"], frame["lower"], frame["upper"] = found["mean"], found["lower"], found["upper"]
            frame["n"], frame["n_clusters"] = found["n"], found["n_clusters"]
            frame["single_token_spellings"] = frame["word"].map(
                dict(zip(self.words, self.single_token_spellings, strict=True))
            )
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def summaries(self, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Entropy and divergence (nats) and share of number tokens: one row per lens × latent × layer × measure."""
        measures = {
            "entropy": (self.entropy, np.inf),
            "divergence": (self.divergence, np.inf),
            "number_first": (self.number_first.astype(float), 1.0),
        }
        frames, settings = [], Settings(resamples=resamples, seed=seed)
        for measure, (values, highest) in measures.items():
            for i, lens in enumerate(self.lenses):
                frame = pd.MultiIndex.from_product(
                    [self.positions, range(values.shape[3])], names=["latent", "layer"]
                ).to_frame(index=False)
                frame.insert(0, "lens", lens)
                frame.insert(1, "measure", measure)
                flat = values[i].reshape(len(self.problems), -1).astype(float)
                found = mean_intervals(flat, self.clusters, settings, bounds=(0.0, highest))
                frames.append(pd.concat([frame, found], axis=1))
        return pd.concat(frames, ignore_index=True)

    def answers(self, trained: Mapping[float, tuple[int, int]]) -> pd.DataFrame:
        """Every answer beside its frequency in the questions that trained the lens.

        Args:
            trained: value -> (training questions with this answer, training questions with it as an earlier step).

        Returns:
            One row per lens × value that is the answer of some prompt: trained_answers, trained_steps, n (prompts with
            this answer), read_when_true and read_when_not (mean share of latents × layers that read the value, on
            prompts with this answer, and on prompts of which it is no value at all), n_not.
        """
        own = [{float(v) for v in (*p.intermediates, p.answer)} for p in self.problems]
        answer = np.array([float(p.answer) for p in self.problems])
        rows = []
        for j, value in enumerate(self.values):
            true = answer == value
            if not true.any():
                continue
            foreign = np.array([value not in values for values in own])
            counts = trained.get(float(value), (0, 0))
            for i, lens in enumerate(self.lenses):
                rows.append(
                    {
                        "lens": lens,
                        "value": value,
                        "trained_answers": counts[0],
                        "trained_steps": counts[1],
                        "n": int(true.sum()),
                        "read_when_true": float(self.reads[i, true, j].mean()),
                        "n_not": int(foreign.sum()),
                        "read_when_not": float(self.reads[i, foreign, j].mean()) if foreign.any() else float("nan"),
                    }
                )
        return pd.DataFrame(rows).sort_values(["lens", "value"], ignore_index=True)

    def table(self) -> pd.DataFrame:
        """Every reading: one row per lens × prompt × latent × layer × target, with rank (0: below TOP) and chance_k."""
        shape = self.rank.shape
        index = np.indices(shape).reshape(5, -1)
        keep = self.rank.reshape(-1) > 0
        lens, prompt, position, layer, target = (axis[keep] for axis in index)
        rank = self.rank.reshape(-1)[keep]
        names = np.array([p.prompt_id for p in self.problems]), np.array(self.clusters)
        frame = pd.DataFrame(
            {
                "lens": np.array(self.lenses)[lens],
                "prompt_id": names[0][prompt],
                "cluster": names[1][prompt],
                "right": self.right[prompt],
                "latent": np.array(self.positions)[position],
                "layer": layer,
                "target": np.array(self.targets)[target],
                "rank": np.where(rank == _NEVER, 0, rank),
            }
        )
        chance = self.chance.reshape(-1, TOP)[keep]
        for k in range(1, TOP + 1):
            frame[f"chance_{k}"] = chance[:, k - 1]
        return frame


def _column_means(values: np.ndarray) -> list[float]:
    return [float(np.nanmean(column)) if not np.isnan(column).all() else float("nan") for column in values.T]


@torch.no_grad()
def detect(
    model: CodiModel,
    lenses: Sequence[LatentLens],
    problems: Sequence[Problem],
    *,
    rule: Rule = "first",
    donors: int = 20,
    words: Sequence[str] = ("therefore",),
    frequency_k: int = 5,
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> Detection:
    """Read every position and layer of every prompt through every lens.

    Args:
        model: the model.
        lenses: all of one model; a position that a lens does not read is left out for all.
        problems: at least 2, with known answers.
        rule: how numbers of several tokens count.
        donors: other prompts per prompt behind the chance level.
        words: word families, in lower case.
        frequency_k: k of the `answers` table.
        batch_size: prompts at once.
        seed: of the choice of donors.
        advance: called with the number of prompts just read.

    Raises:
        ValueError: fewer than 2 problems, or fewer than 1 donor.
    """
    if len(problems) < 2:
        raise ValueError(f"detection needs at least 2 problems (chance level: the others' values), got {len(problems)}")
    if donors < 1:
        raise ValueError(f"donors must be at least 1, got {donors}")
    if not 1 <= frequency_k <= TOP:
        raise ValueError(f"frequency-k must be in 1..{TOP}, got {frequency_k}")
    if model.vocab_size < TOP:
        raise ValueError(f"detection needs a vocabulary of at least {TOP} tokens, got {model.vocab_size}")
    positions = [k for k in range(model.n_latents + 1) if all(lens.reads(k) for lens in lenses)]
    if not positions:
        raise ValueError("these lenses have no position in common")

    steps = [tuple(problem.intermediates[:-1]) for problem in problems]
    n_steps = max(map(len, steps), default=0)
    n_numbers = max((len(problem.numbers) for problem in problems), default=0)
    columns = [*(f"step{i + 1}" for i in range(n_steps)), "answer", *(f"number{i + 1}" for i in range(n_numbers))]
    # every number that occurs, and where: (prompt, column) index into `values`, −1 where there is none
    given = [
        [*own, *[None] * (n_steps - len(own)), p.answer, *p.numbers, *[None] * (n_numbers - len(p.numbers))]
        for own, p in zip(steps, problems, strict=True)
    ]
    values = np.array(sorted({float(v) for row in given for v in row if v is not None}))
    place = {value: i for i, value in enumerate(values)}
    spelled = [number_spellings(model.tokenizer, value) for value in values]
    several = np.array([all(len(ids) > 1 for ids in forms) for forms in spelled])
    where = np.array([[-1 if v is None else place[float(v)] for v in row] for row in given])

    rng = np.random.default_rng(seed)
    n_donors = min(donors, len(problems) - 1)
    donor = np.stack([_others(rng, i, len(problems), n_donors) for i in range(len(problems))])
    foreign = where[donor]  # prompt, donor, column
    thought, asked = slice(0, n_steps + 1), slice(n_steps + 1, None)
    for part in (thought, asked):
        own_values = where[:, part]
        taken = (foreign[:, :, part, None] == own_values[:, None, None, :]).any(-1)
        foreign[:, :, part] = np.where(taken, -1, foreign[:, :, part])

    spelling = _with_absent(_table(spelled, rule))
    word_forms = [word_spellings(model.tokenizer, word) for word in words]
    word_table = _table(word_forms, "all") if words else torch.zeros(0, 1, 1, dtype=torch.long)
    numeric = _number_tokens(model)

    targets = (
        [f"step{i + 1}" for i in range(n_steps)]
        + (["steps"] if n_steps > 1 else [])
        + ["answer"]
        + (["question"] if n_numbers else [])
    )
    shape = (len(lenses), len(problems), len(positions), model.n_layers + 1)
    rank = np.zeros((*shape, len(targets)), np.int8)
    chance = np.full((*shape, len(targets), TOP), np.nan, np.float32)
    entropy, divergence = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    number_first = np.zeros(shape, bool)
    word_rank = np.full((*shape, len(words)), _NEVER, np.int8)
    reads = np.zeros((len(lenses), len(problems), len(values)), np.float32)
    right = np.zeros(len(problems), bool)
    thinking = [k for k in positions if k > 0]

    device = model.device
    for rows in batches(problems, batch_size):
        run = model.rollout(
            model.encode([problems[i].question for i in rows]), model.n_latents, keep=("hidden_states", "cache")
        )
        for i, text in zip(rows, decode_answers(model, run).texts, strict=True):
            right[i] = is_correct(text, problems[i].answer)
        own = spelling[torch.from_numpy(where[rows])].to(device)
        others = spelling[torch.from_numpy(foreign[rows].reshape(len(rows), -1))].to(device)
        every = spelling[:-1].to(device).expand(len(rows), -1, -1, -1)
        in_words = word_table.to(device).expand(len(rows), -1, -1, -1)
        for j, position in enumerate(positions):
            states = latent_states(run, [position])
            target = run.states[:, position].float()
            output = lenses[0].unembed.unembedding(target).log_softmax(-1)
            for layer in range(model.n_layers + 1):
                for i, lens in enumerate(lenses):
                    log_p = lens.log_probs(states, layer)
                    top = log_p.topk(TOP, dim=-1).indices
                    at = (i, rows, j, layer)
                    entropy[at] = -(log_p.exp() * log_p).sum(-1).cpu().numpy()
                    divergence[at] = (output.exp() * (output - log_p)).sum(-1).clamp(min=0).cpu().numpy()
                    number_first[at] = numeric[top[:, 0].cpu().numpy()]
                    found = _targets(ranks(top, own).cpu().numpy(), where[rows] < 0, n_steps, n_numbers)
                    rank[at] = np.where(found == _NEVER + 1, 0, found)
                    donated = ranks(top, others).cpu().numpy().reshape(len(rows), n_donors, -1)
                    there = _targets(donated, foreign[rows] < 0, n_steps, n_numbers)
                    chance[at] = _donor_rates(there)
                    if words:
                        word_rank[at] = ranks(top, in_words).cpu().numpy()
                    if position in thinking:
                        seen = ranks(top[:, :frequency_k], every).cpu().numpy() <= frequency_k
                        reads[i, rows] += seen / (len(thinking) * (model.n_layers + 1))
        advance(len(rows))
    own_several = np.where(where >= 0, several[where], True)
    parts: list[np.ndarray] = [own_several[:, i] for i in range(n_steps)]
    if n_steps > 1:
        parts.append(np.asarray(own_several[:, :n_steps].all(axis=1)))
    parts.append(own_several[:, n_steps])
    if n_numbers:
        parts.append(np.asarray(own_several[:, n_steps + 1 :].all(axis=1)))
    assert len(columns) == where.shape[1]
    return Detection(
        problems=tuple(problems),
        lenses=tuple(lens.name for lens in lenses),
        positions=tuple(positions),
        targets=tuple(targets),
        right=right,
        multi_token=np.stack(parts, axis=1),
        rank=rank,
        chance=chance,
        entropy=entropy,
        divergence=divergence,
        number_first=number_first,
        words=tuple(words),
        word_rank=word_rank,
        single_token_spellings=tuple(sum(len(ids) == 1 for ids in forms) for forms in word_forms),
        values=values,
        reads=reads,
        frequency_k=frequency_k,
    )


def _with_absent(table: Tensor) -> Tensor:
    """The table with one more row that has no spelling: index −1."""
    return torch.cat([table, torch.full_like(table[:1], -1)])


def _others(rng: np.random.Generator, index: int, n: int, number: int) -> np.ndarray:
    chosen = rng.choice(n - 1, size=number, replace=False)
    return np.where(chosen >= index, chosen + 1, chosen)


def _targets(place: np.ndarray, absent: np.ndarray, n_steps: int, n_numbers: int) -> np.ndarray:
    """Ranks of columns (…, column) as ranks of targets (…, target); _NEVER + 1 marks a target that is not there."""
    place = np.where(absent, _NEVER + 1, place.astype(np.int16))
    parts = [place[..., i] for i in range(n_steps)]
    parts += [place[..., :n_steps].min(-1)] if n_steps > 1 else []
    parts += [place[..., n_steps]]
    parts += [place[..., n_steps + 1 :].min(-1)] if n_numbers else []
    return np.stack(parts, axis=-1)


def _donor_rates(place: np.ndarray) -> np.ndarray:
    """(prompt, donor, target) ranks -> (prompt, target, k) share of the donors that have a value; NaN without any."""
    known = place <= _NEVER
    n = known.sum(axis=1)
    hits = np.stack([(known & (place <= k)).sum(axis=1) for k in range(1, TOP + 1)], axis=-1)
    return np.where(n[..., None] > 0, hits / np.maximum(n[..., None], 1), np.nan)


def _number_tokens(model: CodiModel) -> np.ndarray:
    """(vocab,) whether a token is a whole number, with or without spaces around it."""
    known = min(len(model.tokenizer), model.vocab_size)
    texts = model.tokenizer.batch_decode([[i] for i in range(known)])
    found = np.zeros(model.vocab_size, bool)
    found[:known] = [text.strip().isascii() and text.strip().isdigit() for text in texts]
    return found


def value_frequencies(problems: Iterable[Problem]) -> dict[float, tuple[int, int]]:
    """Value -> (problems with this answer, problems with it as an earlier step)."""
    as_answer: Counter[float] = Counter()
    as_step: Counter[float] = Counter()
    for problem in problems:
        as_answer[float(problem.answer)] += 1
        as_step.update({float(value) for value in problem.intermediates[:-1]})
    return {value: (as_answer[value], as_step[value]) for value in sorted(as_answer.keys() | as_step.keys())}


# --- One prompt -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_prompt(model: CodiModel, lenses: Sequence[LatentLens], question: str, k: int = 5) -> tuple[pd.DataFrame, str]:
    """The k most probable tokens at every position and layer of one question.

    Returns:
        Rows lens, latent (0: begin of thought), layer, rank, token_id, token, probability, entropy (nats); and the
        model's answer.
    """
    run = model.rollout(model.encode([question]), model.n_latents, keep=("hidden_states", "cache"))
    rows = []
    for lens in lenses:
        for position in range(model.n_latents + 1):
            if not lens.reads(position):
                continue
            states = latent_states(run, [position])
            for layer in range(model.n_layers + 1):
                log_p = lens.log_probs(states, layer)[0]
                top = log_p.topk(min(k, len(log_p)))
                entropy = float(-(log_p.exp() * log_p).sum())
                for rank, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
                    rows.append(
                        {
                            "lens": lens.name,
                            "latent": position,
                            "layer": layer,
                            "rank": rank,
                            "token_id": token,
                            "token": token_text(model, token),
                            "probability": float(np.exp(value)),
                            "entropy": entropy,
                        }
                    )
    return pd.DataFrame(rows), decode_answers(model, run).texts[0]


def token_text(model: CodiModel, token: int) -> str:
    """Text of one token, unprintable characters escaped; "<id>" where an id alone is no text (part of a character, or
    unknown to the tokenizer)."""
    text = str(model.tokenizer.decode([token])) if token < len(model.tokenizer) else "\ufffd"
    if "\ufffd" in text:
        return f"<{token}>"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- Difference lens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMeans:
    """Mean states (latent 1..n, layer, d_model) float64 over all prompts, and over each half of the clusters."""

    mean: Tensor
    halves: tuple[Tensor, Tensor]
    n: int
    n_clusters: int


@torch.no_grad()
def latent_means(
    model: CodiModel,
    problems: Sequence[Problem],
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> LayerMeans:
    """Mean hidden state of every latent and layer, streamed; halves are a seeded division of the clusters.

    Raises:
        ValueError: fewer than two clusters.
    """
    clusters = sorted({problem.cluster or problem.prompt_id for problem in problems})
    if len(clusters) < 2:
        raise ValueError(f"means in two halves need at least 2 clusters of prompts, got {len(clusters)}")
    order = np.random.default_rng(seed).permutation(len(clusters))
    half = {clusters[c]: i % 2 for i, c in enumerate(order)}
    sums = torch.zeros(2, model.n_latents, model.n_layers + 1, model.d_model, dtype=torch.float64)
    counts = [0, 0]
    for rows in batches(problems, batch_size):
        run = model.rollout(
            model.encode([problems[i].question for i in rows]), model.n_latents, keep=("hidden_states",)
        )
        assert run.hidden_states is not None
        side = torch.tensor([half[problems[i].cluster or problems[i].prompt_id] for i in rows])
        for i in (0, 1):
            sums[i] += run.hidden_states[side.to(run.hidden_states.device) == i].double().sum(dim=0).cpu()
            counts[i] += int((side == i).sum())
        advance(len(rows))
    halves = (sums[0] / counts[0], sums[1] / counts[1])
    return LayerMeans(sums.sum(dim=0) / sum(counts), halves, sum(counts), len(clusters))


@torch.no_grad()
def difference_table(
    model: CodiModel, lenses: Sequence[LatentLens], means: LayerMeans, k: int = TOP, bias: bool = False
) -> pd.DataFrame:
    """Difference lens: the lens on mean_A − mean_B, for all ordered pairs and layers.

    Args:
        lenses: see `LatentLens.difference_logits`; a lens per latent is used with the translators of A.
        means: from `latent_means`.
        k: tokens per cell.
        bias: read the difference as if it were a state (published).

    Returns:
        Rows lens, source (A), target (B), layer, rank, token_id, token, probability, norm (of the difference),
        overlap (share of the k tokens that both halves of the prompts have in common: how much of a cell is not
        noise), numbers (share of number tokens among the k).
    """
    numeric = _number_tokens(model)
    k = min(k, model.vocab_size)
    rows = []
    for lens in lenses:
        for a in range(1, model.n_latents + 1):
            for b in range(1, model.n_latents + 1):
                if a == b or not lens.reads(a):
                    continue
                for layer in range(model.n_layers + 1):

                    def read(
                        mean: Tensor, a: int = a, b: int = b, layer: int = layer, lens: LatentLens = lens
                    ) -> Tensor:
                        difference = (mean[a - 1, layer] - mean[b - 1, layer]).float().to(model.device)
                        return lens.difference_logits(difference, layer, a, bias)

                    top = read(means.mean).softmax(-1).topk(k)
                    first, second = (set(read(half).topk(k).indices.tolist()) for half in means.halves)
                    tokens = top.indices.tolist()
                    shared = {
                        "lens": lens.name,
                        "source": a,
                        "target": b,
                        "layer": layer,
                        "norm": float((means.mean[a - 1, layer] - means.mean[b - 1, layer]).norm()),
                        "overlap": len(first & second) / k,
                        "numbers": float(numeric[tokens].mean()),
                    }
                    for rank, (token, p) in enumerate(zip(tokens, top.values.tolist(), strict=True), 1):
                        rows.append(
                            {
                                **shared,
                                "rank": rank,
                                "token_id": token,
                                "token": token_text(model, token),
                                "probability": p,
                            }
                        )
    return pd.DataFrame(rows)


# --- Transfer ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transfer_table(
    model: CodiModel,
    lenses: Sequence[LatentLens],
    problems: Sequence[Problem],
    *,
    text_tokens: int = 8,
    batch_size: int = 64,
    resamples: int = 2000,
    seed: int = 0,
    advance: Callable[[int], object] = lambda prompts: None,
) -> pd.DataFrame:
    """Every lens at every position, its own or not: KL(model's output ‖ lens), beside the plain lens.

    Args:
        lenses: without the plain one, which is added.
        problems: held out.
        text_tokens: tokens of every question for position TEXT.

    Returns:
        One row per lens × position (TEXT = −1, 0..n) × layer 0..n_layers − 1: divergence with lower and upper,
        plain (the plain lens there), change (divergence − plain, paired) with change_lower and change_upper, agreement
        (share of rows whose most probable token is the model's), n, n_clusters. layer −1: mean over all layers.
    """
    positions = [TEXT, *range(model.n_latents + 1)]
    every = [LatentLens(lenses[0].unembed, model.n_layers), *lenses] if lenses else [LatentLens.plain(model)]
    shape = (len(every), len(problems), len(positions), model.n_layers)
    found, agree = np.full(shape, np.nan), np.full(shape, np.nan)
    generator = torch.Generator().manual_seed(seed)
    for rows in batches(problems, batch_size):
        states = collect_states(model, [problems[i].question for i in rows], positions, text_tokens, generator)
        best = every[0].unembed.unembedding(states.hidden[:, -1].float()).argmax(-1)
        for i, lens in enumerate(every):
            chosen = states.at([position for position in positions if lens.reads(position)])
            mine = torch.isin(states.position, chosen.position.unique())
            divergence = divergence_to_output(lens, chosen)[:, :-1]
            same = torch.stack(
                [(lens.log_probs(chosen, layer).argmax(-1) == best[mine]).float() for layer in range(model.n_layers)],
                dim=1,
            ).cpu()
            for j, position in enumerate(positions):
                here = (chosen.position == position).cpu()
                if not here.any():
                    continue
                prompt = chosen.prompt.cpu()[here]
                count = torch.bincount(prompt, minlength=len(rows))[:, None]
                for store, values in ((found, divergence), (agree, same)):
                    total = torch.zeros(len(rows), model.n_layers).index_add_(0, prompt, values[here])
                    store[i, rows, j] = (total / count).numpy()
        advance(len(rows))
    clusters = [problem.cluster or problem.prompt_id for problem in problems]
    frames, settings = [], Settings(resamples=resamples, seed=seed)
    for i, lens in enumerate(every):
        layers = [-1, *range(model.n_layers)]
        measured, before, alike = (_with_mean(values) for values in (found[i], found[0], agree[i]))
        frame = pd.MultiIndex.from_product([positions, layers], names=["position", "layer"]).to_frame(index=False)
        frame.insert(0, "lens", lens.name)
        level = mean_intervals(measured, clusters, settings, bounds=(0.0, np.inf))
        change = mean_intervals(measured - before, clusters, settings, bounds=(-np.inf, np.inf))
        frame["divergence"], frame["lower"], frame["upper"] = level["mean"], level["lower"], level["upper"]
        frame["plain"] = before.mean(axis=0)
        frame["change"], frame["change_lower"], frame["change_upper"] = (
            change["mean"],
            change["lower"],
            change["upper"],
        )
        frame["agreement"] = alike.mean(axis=0)
        frame["n"], frame["n_clusters"] = level["n"], level["n_clusters"]
        frames.append(frame[frame["n"] > 0])
    return pd.concat(frames, ignore_index=True)


def _with_mean(values: np.ndarray) -> np.ndarray:
    """(prompt, position, layer) -> (prompt, position × (mean over layers, then every layer))."""
    return np.concatenate([values.mean(-1, keepdims=True), values], axis=-1).reshape(len(values), -1)


# --- Causes -----------------------------------------------------------------------------------------------------------


def causal_effects(
    model: CodiModel,
    lens: LatentLens,
    derivation: Sequence[Problem],
    evaluation: Sequence[Problem],
    *,
    latents: Sequence[int],
    layers: Sequence[int],
    n_directions: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], object] = lambda cells: None,
) -> pd.DataFrame:
    """Ablate what the lens reads, inside the model, beside directions it does not read.

    At each latent × layer, directions of four kinds, `n_directions` each: "lens" (causal basis of the lens on the
    derivation prompts), "random" (isotropic), "covariance" (drawn from the states' covariance, so that their ablation
    moves the states about as far as a typical direction in which they vary), "component" (principal components). Each
    is mean-ablated alone on the evaluation prompts and the run goes on.

    Args:
        lens: at the latents asked for.
        derivation: prompts for means and directions.
        evaluation: prompts for effects.
        latents: of 1..n. layers: of 0..n_layers − 1.

    Returns:
        One row per latent × layer × kind × direction × evaluation prompt: energy (of the lens, nats, derivation
        prompts), moved (squared distance by which the ablation moves this prompt's state), output (KL of the model's
        own output distribution at that latent), answer (KL of its distribution of the first answer token), flipped
        (whether the most probable first answer token changed).
    """
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong:
        raise ValueError(
            f"layers must be in 0..{model.n_layers - 1} (at the last one every lens is exact), got {wrong[0]}"
        )
    wrong = [k for k in latents if not 1 <= k <= model.n_latents]
    if wrong:
        raise ValueError(f"latents must be in 1..{model.n_latents}, got {wrong[0]}")
    with torch.no_grad():
        source, fed = _all_states(model, derivation, batch_size)  # (prompt, latent, layer, d_model), mean z
        base = model.rollout(
            model.encode([problem.question for problem in evaluation]),
            model.n_latents,
            keep=("embeddings", "hidden_states", "cache"),
        )
        first = decode_answers(model, base, max_new_tokens=1, keep_first_logits=True).first_logits
    assert first is not None and base.hidden_states is not None and base.embeddings is not None
    answer = first.float().log_softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for k in latents:
        output = model.logits(base.states[:, k]).float().log_softmax(-1)
        start = base.truncate(k - 1)
        for layer in layers:
            x = source[:, k - 1, layer].to(model.device)
            mean = x.mean(dim=0) if layer else fed[k - 1].to(model.device)  # layer 0: z itself, before any position
            basis = causal_basis(lens, x, layer, k, n_directions)
            kinds = {"lens": basis.directions, **_controls(x, n_directions, generator)}
            directions = torch.cat(list(kinds.values()))
            kind = [name for name, rows in kinds.items() for _ in range(len(rows))]
            energy = energies(lens, x, layer, k, directions).tolist()
            seen = (base.hidden_states[:, k - 1, layer] if layer else base.embeddings[:, k - 1]).float()
            per_batch = max(1, batch_size // len(evaluation))
            for begin in range(0, len(directions), per_batch):
                part = directions[begin : begin + per_batch]
                rows = torch.arange(len(evaluation), device=model.device).repeat(len(part))
                each = part.repeat_interleave(len(evaluation), dim=0)
                edit = AblateDirections(k, layer, each, mean)
                with torch.no_grad():
                    run = model.rollout(start.select(rows), model.n_latents, [edit], keep=("cache",))
                    found = decode_answers(model, run, max_new_tokens=1, keep_first_logits=True).first_logits
                    assert found is not None
                    after = found.float().log_softmax(-1)
                    here = model.logits(run.states[:, k]).float().log_softmax(-1)
                    moved = (((seen[rows] - mean) * each).sum(-1) ** 2).cpu().numpy()
                    frames.append(
                        pd.DataFrame(
                            {
                                "latent": k,
                                "layer": layer,
                                "kind": np.repeat(kind[begin : begin + per_batch], len(evaluation)),
                                "direction": np.repeat(
                                    [i % n_directions + 1 for i in range(begin, begin + len(part))], len(evaluation)
                                ),
                                "prompt_id": [p.prompt_id for p in evaluation] * len(part),
                                "cluster": [p.cluster or p.prompt_id for p in evaluation] * len(part),
                                "energy": np.repeat(energy[begin : begin + per_batch], len(evaluation)),
                                "moved": moved,
                                "output": _divergence(output[rows], here),
                                "answer": _divergence(answer[rows], after),
                                "flipped": (answer[rows].argmax(-1) != after.argmax(-1)).cpu().numpy(),
                            }
                        )
                    )
            advance(1)
    return pd.concat(frames, ignore_index=True)


def _divergence(log_p: Tensor, log_q: Tensor) -> np.ndarray:
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu().numpy()


def _all_states(model: CodiModel, problems: Sequence[Problem], batch_size: int) -> tuple[Tensor, Tensor]:
    """(prompt, latent, layer, d_model) states on the CPU, and the mean of z (latent, d_model)."""
    parts, fed = [], []
    for start in range(0, len(problems), batch_size):
        questions = [problem.question for problem in problems[start : start + batch_size]]
        run = model.rollout(model.encode(questions), model.n_latents, keep=("embeddings", "hidden_states"))
        assert run.hidden_states is not None and run.embeddings is not None
        parts.append(run.hidden_states.float().cpu())
        fed.append(run.embeddings.float().cpu())
    return torch.cat(parts), torch.cat(fed).mean(dim=0)


def _controls(x: Tensor, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Unit directions (direction, d_model) that no lens has chosen."""
    away = x - x.mean(dim=0)
    components = torch.linalg.svd(away, full_matrices=False).Vh[:n]
    isotropic = torch.randn(n, x.shape[1], generator=generator).to(x.device)
    mixture = torch.randn(n, len(x), generator=generator).to(x.device) @ away
    return {
        "random": isotropic / isotropic.norm(dim=1, keepdim=True),
        "covariance": mixture / mixture.norm(dim=1, keepdim=True).clamp(min=1e-12),
        "component": components,
    }
