"""What a model does at each latent of each prompt, as rows of trial tables: the parts of `codi alternation`.

    prompts     numbers, steps and answer of every evaluation prompt
    forms       token ids that show each of their values
    positions   likeliest tokens and entropy of h_0..h_n, by the model's own head and by a tuned lens if there is one
    reference   derivation latents (states, keys, values) in the planes of their own first two components
    places      evaluation states in the plane of the derivation states
    direction   cosine of the first component and the end-of-thought embedding, and its resamples
    probes      what a linear probe reads from every latent, beyond shuffled labels
    attention   attention mass of latents and end of thought, mean over layers and heads
    answers     answers after 0..n latents, and with the embedding or the cache slot of one latent replaced by its mean

Every part is about one task (column `task`). Knows nothing about predictions, tests or verdicts: measures.py reads
these tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import decode_answers
from codi.rope import rotate
from experiments.alternation.measures import DEPTH, components, end_cosines, principal_plane, readability, steps_of
from experiments.study.answers import answer_table, trial_schema
from experiments.study.parts import Workbench
from experiments.study.prompts import Asked
from experiments.study.thoughts import rollouts
from experiments.tasks import Problem
from lm.cache import clone_cache
from lm.forward import feed
from steering.means import content_keys
from steering.replacements import MeanAblation, Place, ReplaceRows

if TYPE_CHECKING:
    from codi import CodiModel, EncodedBatch, LatentRollout
    from lenses.latent_lens import LatentLens

__all__ = [
    "SCHEMAS", "Latents", "answers", "attention", "derivation_latents", "direction", "evaluation_states", "forms",
    "mean_slot", "number_tokens", "places", "positions", "probes", "prompts", "read", "reference",
]  # fmt: skip

_NUMBERS = pa.list_(pa.float64())
SCHEMAS: dict[str, pa.Schema] = {
    "prompts": pa.schema({
        "prompt_id": pa.string(), "cluster": pa.string(), "template": pa.string(), "operation": pa.string(),
        "answer": pa.float64(), "numbers": _NUMBERS, "intermediates": _NUMBERS,
    }),
    "forms": pa.schema({"value": pa.float64(), "token": pa.int64()}),
    "positions": pa.schema({
        "prompt_id": pa.string(), "lens": pa.string(), "latent": pa.int16(), "layer": pa.int16(),
        "tokens": pa.list_(pa.int64()), "entropy": pa.float32(),
    }),
    "reference": pa.schema({
        "prompt_id": pa.string(), "cluster": pa.string(), "space": pa.string(), "latent": pa.int16(),
        "first": pa.float64(), "second": pa.float64(),
    }),
    "direction": pa.schema({"resample": pa.int32(), "cosine": pa.float64()}),
    "probes": pa.schema({
        "prompt_id": pa.string(), "target": pa.string(), "latent": pa.int16(), "correct": pa.float64(),
        "shuffled": pa.float64(), "reachable": pa.float64(),
    }),
    "attention": pa.schema({
        "prompt_id": pa.string(), "query": pa.int16(), "numbers": pa.float32(), "rest": pa.float32(),
        "latents": pa.list_(pa.float32()),
    }),
    "answers": trial_schema(kind=pa.string(), latent=pa.int16()),
}  # fmt: skip
"""Columns of the tables, beside `task`. latent is 0 for h_0; query n + 1 is the end of thought; resample -1 stands for
all prompts; kind is "after" (latent = number of latents), "embedding" or "slot" (of that latent, replaced)."""
SCHEMAS["places"] = SCHEMAS["reference"]
SCHEMAS = {name: schema.append(pa.field("task", pa.string())) for name, schema in SCHEMAS.items()}


# --- Shared by the parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Unedited latents of some prompts, on the CPU.

    Attributes:
        states: (prompt, latent 0..n, d_model) h_0..h_n, in the model's dtype.
        means: (latent 1..n, d_model) means of z_1..z_n.
        slots: keys (rotation undone) and values, (latent 1..n, layer, kv_head, d_head), means of the cache slots.
        keys, values: (prompt, latent 1..n, feature) cache slots, all layers joined, rotation undone.
    """

    states: Tensor
    means: Tensor
    slots: tuple[Tensor, Tensor]
    keys: np.ndarray
    values: np.ndarray


def derivation_latents(bench: Workbench, asked: Asked, batch_size: int) -> Latents:
    """Latents of the derivation prompts."""
    parts: dict[str, list[Tensor]] = {"states": [], "embeddings": [], "keys": [], "values": []}
    for rows in _watched(bench, _derivation(bench, asked), batch_size, f"{asked.task}: means"):
        for run, _ in rollouts(bench.model, rows, bench.model.n_latents, ("embeddings", "keys", "values")):
            assert run.embeddings is not None and run.values is not None
            parts["states"].append(run.states.cpu())
            parts["embeddings"].append(run.embeddings.double().cpu())
            parts["keys"].append(content_keys(run, bench.model).float().cpu())
            parts["values"].append(run.values.float().cpu())
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    keys, values = joined["keys"], joined["values"]
    return Latents(
        states=joined["states"],
        means=joined["embeddings"].mean(0),
        slots=(keys.double().mean(0), values.double().mean(0)),
        keys=keys.flatten(2).numpy(),
        values=values.flatten(2).numpy(),
    )


def evaluation_states(bench: Workbench, asked: Asked, batch_size: int) -> Tensor:
    """(prompt, latent 0..n, d_model) h_0..h_n of the evaluation prompts, in the model's dtype, on the CPU."""
    found = []
    for rows in _watched(bench, _evaluation(bench, asked), batch_size, f"{asked.task}: states"):
        for run, _ in rollouts(bench.model, rows, bench.model.n_latents, ()):
            found.append(run.states.cpu())
    return torch.cat(found)


def _evaluation(bench: Workbench, asked: Asked) -> Sequence[Problem]:
    return bench.prompts.evaluation[slice(*asked.evaluation)]


def _derivation(bench: Workbench, asked: Asked) -> Sequence[Problem]:
    return bench.prompts.derivation[slice(*asked.derivation)]


def _batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _watched(bench: Workbench, problems: Sequence[Problem], size: int, what: str) -> Iterator[Sequence[Problem]]:
    """Batches, with a progress bar over the prompts."""
    with bench.bar(len(problems), "prompt", what) as advance:
        for batch in _batches(problems, size):
            yield batch
            advance(len(batch))


def _states(latents: Latents) -> np.ndarray:
    """(prompt, latent 1..n, d_model) float32."""
    return latents.states[:, 1:].float().numpy()


# --- Prompts and what lenses read -------------------------------------------------------------------------------------


def prompts(bench: Workbench, *, seed: int, asked: Asked) -> pd.DataFrame:
    """What is known about the evaluation prompts."""
    problems = _evaluation(bench, asked)
    return pd.DataFrame({
        "prompt_id": [problem.prompt_id for problem in problems],
        "cluster": [problem.cluster or problem.prompt_id for problem in problems],
        "template": [problem.template for problem in problems],
        "operation": [problem.operation for problem in problems],
        "answer": [float(problem.answer) for problem in problems],
        "numbers": [[float(number) for number in problem.numbers] for problem in problems],
        "intermediates": [[float(value) for value in problem.intermediates] for problem in problems],
        "task": asked.task,
    })  # fmt: skip


def forms(bench: Workbench, *, seed: int, asked: Asked) -> pd.DataFrame:
    """Token ids that show the values of the evaluation prompts."""
    values = {value for problem in _evaluation(bench, asked) for value in (*steps_of(problem), problem.answer)}
    rows = [(float(value), token) for value in sorted(values) for token in number_tokens(bench.model, value)]
    return pd.DataFrame(rows, columns=["value", "token"]).assign(task=asked.task)


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


@torch.no_grad()
def positions(
    bench: Workbench, *, seed: int, asked: Asked, batch_size: int, lens: str = "", lens_name: str = ""
) -> pd.DataFrame:
    """What the model's own head reads from h_0..h_n, and what a tuned lens reads from the layers below the last.

    Raises:
        ValueError: a lens that does not read every latent.
    """
    model, problems = bench.model, _evaluation(bench, asked)
    states = bench.once(evaluation_states, asked, batch_size)
    frames: list[pd.DataFrame] = []
    for start in range(0, len(problems), batch_size):
        rows, mine = problems[start : start + batch_size], states[start : start + batch_size].to(model.device)
        for k in range(model.n_latents + 1):  # one at a time: vocabularies are large
            frames.append(_read_rows(rows, "own", k, model.n_layers, *read(model.logits(mine[:, k]))))
    if lens:
        chosen = _lens(model, lens, lens_name)
        for batch in _batches(problems, batch_size):
            for run, members in rollouts(model, batch, model.n_latents, ("hidden_states",)):
                frames += _tuned_rows(model, chosen, run, members)
    return pd.concat(frames, ignore_index=True).assign(task=asked.task)


def _lens(model: CodiModel, folder: str, name: str) -> LatentLens:
    from lenses.latent_lens import choose_lens, load_lenses, unembed

    head = unembed(model)
    saved = {} if name == "plain" else load_lenses(Path(folder), model, head)
    lens = choose_lens(name, saved, model, head)
    unread = [k for k in range(1, model.n_latents + 1) if not lens.reads(k)]
    if unread:
        raise ValueError(f"lens {name!r} does not read latent {unread[0]}: choose one for all latents")
    return lens


def _tuned_rows(
    model: CodiModel, lens: LatentLens, run: LatentRollout, problems: Sequence[Problem]
) -> list[pd.DataFrame]:
    assert run.hidden_states is not None and run.bot_hidden_states is not None
    hidden = torch.cat((run.bot_hidden_states[:, None], run.hidden_states), dim=1)
    nothing = (np.full((len(problems), DEPTH), -1), np.full(len(problems), np.nan))
    frames = []
    for k in range(model.n_latents + 1):
        for layer in range(model.n_layers):
            found = read(lens.logits(hidden[:, k, layer], layer, k)) if lens.reads(k) else nothing
            frames.append(_read_rows(problems, "tuned", k, layer, *found))
    return frames


def _read_rows(
    problems: Sequence[Problem], lens: str, latent: int, layer: int, tokens: np.ndarray, entropy: np.ndarray
) -> pd.DataFrame:
    ids = [problem.prompt_id for problem in problems]
    given = {"lens": lens, "latent": latent, "layer": layer}
    return pd.DataFrame({"prompt_id": ids, **given, "tokens": list(tokens), "entropy": entropy})


# --- Places, directions and probes ------------------------------------------------------------------------------------


def reference(bench: Workbench, *, seed: int, asked: Asked, batch_size: int) -> pd.DataFrame:
    """Derivation latents in the plane of their own first two components: states, keys and values."""
    latents = bench.once(derivation_latents, asked, batch_size)
    spaces = {"states": _states(latents), "keys": latents.keys, "values": latents.values}
    frames = [
        _place_rows(_derivation(bench, asked), space, components(array, principal_plane(array, seed)))
        for space, array in spaces.items()
    ]
    return pd.concat(frames, ignore_index=True).assign(task=asked.task)


def places(bench: Workbench, *, seed: int, asked: Asked, batch_size: int) -> pd.DataFrame:
    """Evaluation states in the plane of the derivation states."""
    plane = principal_plane(_states(bench.once(derivation_latents, asked, batch_size)), seed)
    states = bench.once(evaluation_states, asked, batch_size)[:, 1:].float().numpy()
    return _place_rows(_evaluation(bench, asked), "states", components(states, plane)).assign(task=asked.task)


def _place_rows(problems: Sequence[Problem], space: str, coordinates: np.ndarray) -> pd.DataFrame:
    n = coordinates.shape[1]
    return pd.DataFrame({
        "prompt_id": np.repeat([problem.prompt_id for problem in problems], n),
        "cluster": np.repeat([problem.cluster or problem.prompt_id for problem in problems], n),
        "space": space,
        "latent": np.tile(np.arange(1, n + 1), len(problems)),
        "first": coordinates[:, :, 0].ravel(),
        "second": coordinates[:, :, 1].ravel(),
    })  # fmt: skip


@torch.no_grad()
def direction(bench: Workbench, *, seed: int, asked: Asked, batch_size: int) -> pd.DataFrame:
    """Cosine of the first component of derivation states and the embedding of the end-of-thought token."""
    model, problems = bench.model, _derivation(bench, asked)
    end = model.embed(torch.tensor(model.protocol.eot_id, device=model.device)).float().cpu().numpy()
    clusters = np.array([problem.cluster or problem.prompt_id for problem in problems])
    cosines = end_cosines(_states(bench.once(derivation_latents, asked, batch_size)), clusters, end, seed)
    return pd.DataFrame({"resample": np.arange(-1, len(cosines) - 1), "cosine": cosines, "task": asked.task})


def probes(bench: Workbench, *, seed: int, asked: Asked, batch_size: int) -> pd.DataFrame:
    """What linear probes read from h_1..h_n of the evaluation prompts."""
    problems = _evaluation(bench, asked)
    states = bench.once(evaluation_states, asked, batch_size)[:, 1:].float().numpy()
    n = states.shape[1]
    frames = [
        pd.DataFrame({
            "prompt_id": np.repeat([problem.prompt_id for problem in problems], n),
            "target": target,
            "latent": np.tile(np.arange(1, n + 1), len(problems)),
            "correct": read.correct.ravel(),
            "shuffled": read.shuffled.ravel(),
            "reachable": read.reachable,
            "task": asked.task,
        })
        for target, read in readability(states, problems, seed=seed).items()
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=SCHEMAS["probes"].names)


# --- Answers ----------------------------------------------------------------------------------------------------------


def answers(
    bench: Workbench, *, seed: int, asked: Asked, batch_size: int, max_new_tokens: int | None = None
) -> pd.DataFrame:
    """Answers after 0..n latents, and after n latents of which one was fed its mean embedding or left the mean slot in
    the cache (which latent k itself does not see, but whatever follows it does)."""
    model, n = bench.model, bench.model.n_latents
    latents = bench.once(derivation_latents, asked, batch_size)
    means = latents.means.to(model.device)
    frames = []
    for problems in _watched(bench, _evaluation(bench, asked), batch_size, f"{asked.task}: answers"):
        run = model.rollout(model.encode([problem.question for problem in problems]), n, keep=("cache",))
        cut = [run.truncate(k) for k in range(n + 1)]
        thoughts = [("after", k, cut[k]) for k in range(n + 1)]
        for k in range(1, n + 1):
            edits = {"embedding": MeanAblation(k, means[k - 1]), "slot": mean_slot(model, run, k, latents.slots)}
            thoughts += [
                (kind, k, model.rollout(cut[k - 1], n, (edit,), keep=("cache",))) for kind, edit in edits.items()
            ]
        for kind, latent, thought in thoughts:
            texts = decode_answers(model, thought, max_new_tokens).texts
            frames.append(answer_table(problems, range(len(problems)), texts, kind=kind, latent=latent))
    return pd.concat(frames, ignore_index=True).assign(task=asked.task)


def mean_slot(model: CodiModel, run: LatentRollout, latent: int, slots: tuple[Tensor, Tensor]) -> ReplaceRows:
    """The cache slot of one latent becomes its mean over other prompts, keys turned to each prompt's own position."""
    keys, values = (mean[latent - 1].to(model.device) for mean in slots)  # (layer, kv_head, d_head)
    positions = run.latent_positions[:, latent - 1].to(model.device)
    turned = rotate(keys.expand(len(run), *keys.shape), positions[:, None, None], model)
    everyone = torch.ones(len(run), dtype=torch.bool)
    places: dict[Place, tuple[Tensor, Tensor]] = {}
    for layer in range(model.n_layers):
        places["keys", latent, layer + 1] = (everyone, turned[:, layer])
        places["values", latent, layer + 1] = (everyone, values[layer].expand(len(run), *values.shape[1:]))
    return ReplaceRows(places)


# --- Attention --------------------------------------------------------------------------------------------------------


def attention(bench: Workbench, *, seed: int, asked: Asked, batch_size: int) -> pd.DataFrame:
    """Attention of latents 1..n and of the end of thought to numbers, to the rest of the prompt and to each latent."""
    model, n = bench.model, bench.model.n_latents
    frames = []
    for problems in _watched(bench, _evaluation(bench, asked), batch_size, f"{asked.task}: attention"):
        batch = model.encode([problem.question for problem in problems])
        mass = _attention(model, batch, model.rollout(batch, n, keep=("attentions", "cache")))
        frames.append(
            pd.DataFrame({
                "prompt_id": np.repeat([problem.prompt_id for problem in problems], n + 1),
                "query": np.tile(np.arange(1, n + 2), len(problems)),
                "numbers": mass[:, :, 0].ravel(),
                "rest": mass[:, :, 1].ravel(),
                "latents": list(mass[:, :, 2:].reshape(-1, n)),
            })
        )  # fmt: skip
    return pd.concat(frames, ignore_index=True).assign(task=asked.task)


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
