"""What can be measured at each latent of each prompt, behind the alternation test and the claims about single latents.

`observe` runs a model once over the prompts and keeps what the measures read: the last states and what the lens reads
from them, attention, answers after every number of latents and with every latent mean-ablated. The functions after it
turn observations into one number per prompt and latent:

    detection    is a value among the top-k tokens of the lens, minus how often other prompts' values are
    components   place in the plane of the first two principal components of other prompts' latents
    readability  held-out hits of a linear probe, minus those of the same probe on shuffled labels

Observations are plain arrays, so a simulated model is one that fills them in. Knows nothing about predictions, tests or
verdicts. Not a command of its own: `codi alternation` uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from codi import decode_answers
from experiments.statistics.probes import Design, ProbeScores, Target, probe
from experiments.study.targets import targets_of
from experiments.tasks import Problem, is_correct
from lm.cache import clone_cache
from lm.forward import feed
from steering.means import content_keys
from steering.replacements import MeanAblation

if TYPE_CHECKING:
    from codi import CodiModel, EncodedBatch, LatentRollout
    from lenses.latent_lens import LatentLens

__all__ = [
    "DEPTH", "Observations", "Readings", "Reference", "chance_corrected", "components", "detection",
    "number_tokens", "observe", "principal_plane", "read", "readability", "steps_of",
]  # fmt: skip

DEPTH = 10
"""Tokens of a lens that are kept; detection can be asked for at any k up to this."""


@dataclass(frozen=True)
class Readings:
    """What a lens says at every position.

    Attributes:
        tokens: (prompt, latent 0..n, layer, DEPTH) ids of the likeliest tokens, best first; latent 0 is h_0. The plain
            reading has one layer, the last.
        entropy: (prompt, latent 0..n, layer) of the whole distribution, nats.
    """

    tokens: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Latents of the derivation prompts, which share no number triple with the observed ones.

    Attributes:
        clusters: (prompt,).
        states: (prompt, latent 1..n, d_model) h_1..h_n.
        embeddings: (latent 1..n, d_model) means of z_1..z_n, what an ablated latent is replaced by.
        keys, values: (prompt, latent 1..n, feature) cache slots, all layers joined, rotation undone.
    """

    clusters: np.ndarray
    states: np.ndarray
    embeddings: np.ndarray
    keys: np.ndarray | None = None
    values: np.ndarray | None = None


@dataclass(frozen=True)
class Observations:
    """A model's latents on n prompts. A field that is None was not observed.

    Attributes:
        problems: the prompts.
        states: (prompt, latent 0..n, d_model) h_0..h_n.
        readings: of the model's own head on h_0..h_n.
        forms: value -> token ids that show it (its first token, with and without a space before it).
        correct_after: (prompt, number of latents 0..n) whether the answer after so many latents is right.
        correct_ablated: (prompt, latent 1..n) whether it is right with that latent's embedding mean-ablated.
        attention: (prompt, query: latent 1..n then end of thought, key: number tokens, rest of the prompt, latent 1..n)
            attention mass, mean over layers and heads.
        reference: latents of other prompts.
        tuned: readings of a tuned lens, layers below the last; None if there is no lens.
    """

    problems: tuple[Problem, ...]
    states: np.ndarray
    readings: Readings
    forms: Mapping[Any, tuple[int, ...]]
    reference: Reference
    correct_after: np.ndarray | None = None
    correct_ablated: np.ndarray | None = None
    attention: np.ndarray | None = None
    tuned: Readings | None = None

    @property
    def n_latents(self) -> int:
        """Latents per prompt."""
        return self.states.shape[1] - 1

    @property
    def clusters(self) -> np.ndarray:
        """(prompt,) names of the number triples."""
        return np.array([problem.cluster or problem.prompt_id for problem in self.problems])


# --- Values and detection ---------------------------------------------------------------------------------------------


def steps_of(problem: Problem) -> tuple[int | float, ...]:
    """Values of the steps before the last one."""
    return tuple(problem.intermediates[:-1])


def number_tokens(model: CodiModel, value: int | float) -> tuple[int, ...]:
    """Token ids that show a number: its first token with and without a space before it.

    A number of several tokens is shown by its first; numbers that begin alike then count as hits of each other, which
    the chance level (other prompts' values) takes off again. A token that is a space and nothing else shows nothing.
    """
    text = f"{value:g}" if isinstance(value, float) else str(value)
    found = []
    for form in (text, f" {text}"):
        ids = model.tokenizer(form, add_special_tokens=False)["input_ids"]
        while len(ids) > 1 and not model.tokenizer.decode(ids[:1]).strip():
            ids = ids[1:]
        found.append(int(ids[0]))
    return tuple(sorted(set(found)))


def read(logits: Tensor, depth: int = DEPTH) -> tuple[np.ndarray, np.ndarray]:
    """Likeliest tokens (…, depth) and entropy (…,) in nats of logits (…, vocab)."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    return log_p.topk(min(depth, log_p.shape[-1]), dim=-1).indices.cpu().numpy(), entropy.cpu().numpy()


def chance_corrected(
    tokens: np.ndarray,
    values: Sequence[int | float | None],
    forms: Mapping[Any, tuple[int, ...]],
    clusters: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each prompt's value is among its top-k tokens, and how often other prompts' values are.

    Args:
        tokens: (prompt, position, depth) best first.
        values: one per prompt; None: this prompt has none and gets NaN.
        forms: value -> its token ids.
        clusters: (prompt,); the chance level takes values of prompts of other clusters only.
        k: 1..depth.

    Returns:
        hit, chance: (prompt, position) each; hit is 0 or 1, chance the share of other clusters' prompts (with a value)
        whose value is among this prompt's top-k. hit − chance is 0 on average for a lens that knows nothing about the
        prompt, however frequent its favourite numbers are.

    Raises:
        ValueError: k outside 1..depth.
    """
    if not 1 <= k <= tokens.shape[-1]:
        raise ValueError(f"k must be in 1..{tokens.shape[-1]}, got {k}")
    hit = np.full(tokens.shape[:2], np.nan)
    chance = hit.copy()
    names = sorted({value for value in values if value is not None})
    if not names:
        return hit, chance
    shown = np.stack([np.isin(tokens[..., :k], forms[name]).any(-1) for name in names], axis=-1)
    column = {name: i for i, name in enumerate(names)}
    own = np.array([-1 if value is None else column[value] for value in values])
    codes = np.unique(clusters, return_inverse=True)[1]
    counts = np.zeros((codes.max() + 1, len(names)))
    np.add.at(counts, (codes[own >= 0], own[own >= 0]), 1)
    others = counts.sum(0) - counts
    weights = others / np.maximum(others.sum(1, keepdims=True), 1)
    rows = np.flatnonzero(own >= 0)
    hit[rows] = shown[rows, :, own[rows]]
    chance[rows] = np.einsum("ptv,pv->pt", shown[rows], weights[codes[rows]])
    return hit, chance


def detection(
    observations: Observations, which: int | str, k: int = 5, tuned: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Detection of one kind of value, prompt by prompt.

    A value that stands in the question, or is also another step's or the answer's, shows nothing about reasoning: it is
    left out for that prompt (NaN).

    Args:
        observations: of the model.
        which: step number 1.. (before the last), "intermediate" (mean over those steps) or "final" (the answer).
        k: how many of the likeliest tokens count.
        tuned: read the tuned lens (mean over its layers) instead of the model's head.

    Returns:
        hit, chance: (prompt, latent 0..n).
    """
    problems = observations.problems
    if which == "intermediate":
        numbers = range(1, 1 + max(len(steps_of(problem)) for problem in problems))
        pairs = [detection(observations, number, k, tuned) for number in numbers]
        empty = np.full(observations.states.shape[:2], np.nan)
        return tuple(_nanmean([pair[i] for pair in pairs] or [empty]) for i in (0, 1))  # type: ignore[return-value]
    values: list[int | float | None] = []
    for problem in problems:
        parts = [*steps_of(problem), problem.answer]
        index = len(parts) - 1 if which == "final" else int(which) - 1
        known = index < len(parts) - (which != "final")
        clear = known and parts.count(parts[index]) == 1 and parts[index] not in problem.numbers
        values.append(parts[index] if clear else None)
    readings = observations.tuned if tuned else observations.readings
    assert readings is not None, "there is no tuned lens"
    layers = range(readings.tokens.shape[2])
    found = [
        chance_corrected(readings.tokens[:, :, layer], values, observations.forms, observations.clusters, k)
        for layer in layers
    ]
    return np.mean([hit for hit, _ in found], axis=0), np.mean([chance for _, chance in found], axis=0)


def _nanmean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    stacked = np.stack(arrays)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


# --- Components and probes --------------------------------------------------------------------------------------------


def principal_plane(latents: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """First two principal components of latents pooled over prompts and positions.

    Args:
        latents: (prompt, latent, feature).
        seed: of the randomised solver, used for wide features.

    Returns:
        mean (feature,), axes (2, feature) orthonormal, and the standard deviation in the plane (root mean square over
        the two axes).
    """
    from sklearn.decomposition import PCA

    rows = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    wide = rows.shape[1] > 1024
    fitted = PCA(2, svd_solver="randomized" if wide else "full", random_state=seed).fit(rows)
    return fitted.mean_, fitted.components_, float(np.sqrt(fitted.explained_variance_.mean()))


def components(latents: np.ndarray, plane: tuple[np.ndarray, np.ndarray, float]) -> np.ndarray:
    """(prompt, latent, 2) coordinates in a principal plane, in units of its standard deviation."""
    mean, axes, scale = plane
    return (latents - mean) @ axes.T / (scale or 1.0)


def readability(
    states: np.ndarray, problems: Sequence[Problem], folds: int = 5, shuffles: int = 4, seed: int = 0
) -> dict[str, np.ndarray]:
    """How well ridge probes read steps and answer from every latent.

    Args:
        states: (prompt, latent, feature).
        problems: with known steps.
        folds, shuffles, seed: see `experiments.statistics.probes.Design`; folds are reduced to the number of clusters.

    Returns:
        target ("step1", …, "answer") -> (prompt, latent) held-out hit with the true labels minus the mean of the same
        with shuffled labels. Targets with too many values for a classifier are left out.
    """
    targets: list[Target] = [t for t in targets_of(problems) if t.name == "answer" or t.name.startswith("step")]
    clusters = [problem.cluster or problem.prompt_id for problem in problems]
    folds = min(folds, len(set(clusters)))
    if not targets or folds < 3:
        return {}
    design = Design.of(targets, clusters, folds, shuffles, seed)
    scores: list[ProbeScores] = [probe(states[:, k], design) for k in range(states.shape[1])]
    found = {}
    for target in targets:
        gain = np.stack([score.correct[target.name] - score.shuffled[target.name] for score in scores], axis=1)
        if np.isfinite(gain).all():
            found[target.name] = gain
    return found


# --- Running the model ------------------------------------------------------------------------------------------------


def observe(
    model: CodiModel,
    derivation: Sequence[Problem],
    evaluation: Sequence[Problem],
    *,
    lens: LatentLens | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    advance: Callable[[int], object] = lambda prompts: None,
) -> Observations:
    """Run the model over the prompts and keep what the measures read.

    Args:
        model: loaded with attention="eager" (attention weights are kept).
        derivation: prompts behind means and components; they must share nothing with the others.
        evaluation: prompts that are observed.
        lens: a tuned lens to read besides the model's own head.
        max_new_tokens: longest answer in tokens; None: the model's default.
        batch_size: prompts at once.
        advance: called with the number of prompts just done.

    Raises:
        ValueError: no prompts, or a model that does not give attention weights.
    """
    if not derivation or not evaluation:
        raise ValueError(f"observe needs prompts of both kinds, got {len(derivation)} and {len(evaluation)}")
    if model.attention != "eager":
        raise ValueError(f"attention weights need a model loaded with attention='eager', got {model.attention!r}")
    reference = _reference(model, derivation, batch_size, advance)
    means = torch.from_numpy(reference.embeddings)
    values = {value for problem in evaluation for value in (*steps_of(problem), problem.answer)}
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(evaluation), batch_size):
        rows = evaluation[start : start + batch_size]
        for name, array in _observe_batch(model, rows, means, lens, max_new_tokens).items():
            parts.setdefault(name, []).append(array)
        advance(len(rows))
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Observations(
        problems=tuple(evaluation),
        states=found["states"],
        readings=Readings(found["tokens"], found["entropy"]),
        forms={value: number_tokens(model, value) for value in values},
        reference=reference,
        correct_after=found["correct_after"],
        correct_ablated=found["correct_ablated"],
        attention=found["attention"],
        tuned=None if lens is None else Readings(found["tuned_tokens"], found["tuned_entropy"]),
    )


def _reference(
    model: CodiModel, problems: Sequence[Problem], batch_size: int, advance: Callable[[int], object]
) -> Reference:
    parts: dict[str, list[Tensor]] = {"states": [], "embeddings": [], "keys": [], "values": []}
    for start in range(0, len(problems), batch_size):
        rows = problems[start : start + batch_size]
        batch = model.encode([problem.question for problem in rows])
        run = model.rollout(batch, model.n_latents, keep=("embeddings", "keys", "values"))
        assert run.embeddings is not None and run.values is not None
        parts["states"].append(run.states[:, 1:].float())
        parts["embeddings"].append(run.embeddings.double())
        parts["keys"].append(content_keys(run, model).float().flatten(2))
        parts["values"].append(run.values.float().flatten(2))
        advance(len(rows))
    joined = {name: torch.cat(tensors).cpu() for name, tensors in parts.items()}
    return Reference(
        clusters=np.array([problem.cluster or problem.prompt_id for problem in problems]),
        states=joined["states"].numpy(),
        embeddings=joined["embeddings"].mean(0).numpy(),
        keys=joined["keys"].numpy(),
        values=joined["values"].numpy(),
    )


def _observe_batch(
    model: CodiModel,
    problems: Sequence[Problem],
    means: Tensor,
    lens: LatentLens | None,
    max_new_tokens: int | None,
) -> dict[str, np.ndarray]:
    batch = model.encode([problem.question for problem in problems])
    n = model.n_latents
    keep = ("attentions", "cache", *(("hidden_states",) if lens is not None else ()))
    run = model.rollout(batch, n, keep=keep)
    own = [read(model.logits(run.states[:, k])) for k in range(n + 1)]  # one at a time: vocabularies are large
    found = {
        "states": run.states.float().cpu().numpy(),
        "tokens": np.stack([tokens for tokens, _ in own], 1)[:, :, None],
        "entropy": np.stack([entropy for _, entropy in own], 1)[:, :, None],
        "attention": _attention(model, batch, run),
    }
    if lens is not None:
        assert run.hidden_states is not None and run.bot_hidden_states is not None
        hidden = torch.cat((run.bot_hidden_states[:, None], run.hidden_states), dim=1)
        layers = range(model.n_layers)
        readings = [
            [read(lens.logits(hidden[:, k, layer], layer, k)) for layer in layers] if lens.reads(k) else None
            for k in range(n + 1)
        ]
        nothing = (np.full((len(problems), DEPTH), -1), np.full(len(problems), np.nan))
        filled = [[nothing] * len(layers) if row is None else row for row in readings]
        found["tuned_tokens"] = np.stack([np.stack([cell[0] for cell in row], 1) for row in filled], 1)
        found["tuned_entropy"] = np.stack([np.stack([cell[1] for cell in row], 1) for row in filled], 1)

    def right(thought: LatentRollout) -> list[bool]:
        texts = decode_answers(model, thought, max_new_tokens).texts
        return [is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)]

    cut = [run.truncate(k) for k in range(n + 1)]
    found["correct_after"] = np.array([right(thought) for thought in cut]).T
    ablated = [
        model.rollout(cut[k - 1], n, (MeanAblation(k, means[k - 1].to(model.device)),), keep=("cache",))
        for k in range(1, n + 1)
    ]
    found["correct_ablated"] = np.array([right(thought) for thought in ablated]).T
    return found


def _attention(model: CodiModel, batch: EncodedBatch, run: LatentRollout) -> np.ndarray:
    """(prompt, latent 1..n and end of thought, number tokens + rest of prompt + latents) mean attention mass."""
    assert run.attentions is not None and run.past_key_values is not None
    n, width = run.n_latents, run.prompt_width
    position = run.first_position + n
    mask = torch.cat((run.attention_mask, run.attention_mask.new_ones(len(run), 1)), dim=1)
    end = torch.tensor(model.protocol.after_latents[:1], device=model.device).expand(len(run), -1)
    with torch.no_grad():
        step = feed(
            model,
            model.embed(end),
            clone_cache(run.past_key_values),
            None if model.mask == "published" else mask,
            position[:, None],
            attentions=True,
        )
    assert step.attentions is not None
    latents = run.attentions.float().mean(dim=(2, 3))
    last = step.attentions.float().mean(dim=(2, 3))[..., : width + n]
    weights = torch.cat((latents, last), dim=1)
    numbers = _number_mask(model, batch).to(weights)
    prompt = weights[..., :width]
    on_numbers = (prompt * numbers[:, None]).sum(-1, keepdim=True)
    rest = prompt.sum(-1, keepdim=True) - on_numbers
    return torch.cat((on_numbers, rest, weights[..., width:]), dim=-1).cpu().numpy()


def _number_mask(model: CodiModel, batch: EncodedBatch) -> Tensor:
    """(batch, position) bool: tokens of the prompt that are digits."""
    known = {
        token: token < len(model.tokenizer) and model.tokenizer.decode([token]).strip().isdigit()
        for token in batch.input_ids.unique().tolist()
    }
    digits = torch.tensor([token for token, digit in known.items() if digit], dtype=torch.long)
    return torch.isin(batch.input_ids.to(model.device), digits.to(model.device)) & batch.attention_mask.to(model.device)
