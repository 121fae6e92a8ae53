"""Training tuned lenses on latents: every lens × layer at once, in one pass over streamed rollouts.

    loss of lens g, layer l = mean over its positions and prompts of KL(model's own output ‖ lens), nats

The target is the distribution the model itself gives at that position, unembedding(last state): the last state is
normed already and is not normed again (published lenses were trained with a target that was). Translators start as
the identity, are kept in float32 and have a loss, a gradient clip and an early stop of their own, so a lens trained
together with others is the lens trained alone. A batch is rolled out once and serves all of them; nothing of it is
kept, so memory does not grow with the number of prompts.

The caller gives question batches as a function of the step, so an interrupted run goes on where it was::

    training = LensTraining(model, {"1": (1,), "all": (1, 2, 3, 4, 5, 6)}, TrainingOptions(steps=200))
    training.fit(lambda step: questions[step % len(questions)], validation=[held_out])
    training.lenses["all"]                                         # a tuned_lens TunedLens

Knows nothing about tasks, files other than the state it is told to save, or figures.

Source: Belrose et al. 2023, arXiv 2303.08112 (recipe "sgd": Nesterov, clip 1, linear decay).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tuned_lens.nn import TunedLens

from lenses.latent_lens import TEXT, LatentLens, States, latent_states, new_lens, text_states, unembed
from lm.errors import UserError
from lm.text import EncodedBatch, left_padded

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["LensTraining", "TrainingOptions", "collect_states", "divergence_to_output", "encode_passages"]

LOGIT_BUDGET = 2**25
"""Most logits held at once (float32: 128 MB, a few times that with gradients)."""

Questions = Callable[[int], Sequence[str]]


@dataclass(frozen=True)
class TrainingOptions:
    """How lenses are trained."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd: the recipe of the tuned-lens paper (Nesterov momentum)."""
    lr: float | None = None
    """Highest learning rate; None: 1e-3 for adamw, 0.1 for sgd (the paper's 1.0 × (1 − momentum))."""
    weight_decay: float = 1e-3
    """Weight decay; it pulls a translator towards the identity, because translators are added to the state."""
    momentum: float = 0.9
    """Momentum of sgd, first beta of adamw."""
    clip: float = 1.0
    """Largest gradient norm of one translator."""
    steps: int = 400
    """Most steps, one batch of prompts each; the rate decays linearly to zero over them."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises from zero."""
    evaluate_every: int = 25
    """Steps between looks at the validation prompts."""
    patience: int = 4
    """A translator stops after so many looks in a row without a better validation KL; its best weights are kept."""
    text_tokens: int = 8
    """Text tokens taken from each prompt (of lenses trained on text)."""
    seed: int = 0
    """Of the choice of text tokens."""
    target: Literal["output", "published"] = "output"
    """output: the model's own distribution; published: the last state normed a second time, as published lenses had."""
    schedule: Literal["linear", "constant"] = "linear"
    """Rate: warm-up and linear decay, or constant."""
    early_stopping: bool = True
    """Stop translators and give them their best weights; otherwise all steps are done and the last weights kept."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "patience", "text_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "sgd"):
            raise UserError(f"optimizer must be adamw or sgd, got {self.optimizer!r}")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        if not self.clip > 0:
            raise UserError(f"clip must be above 0, got {self.clip}")
        if not 0 <= self.momentum < 1 or not 0 <= self.warmup < 1:
            raise UserError(f"momentum and warmup must be in 0..1 (1 excluded), got {self.momentum} and {self.warmup}")
        if not self.weight_decay >= 0:
            raise UserError(f"weight-decay must be 0 or more, got {self.weight_decay}")

    def rate(self, step: int) -> float:
        """Learning rate of step 0..steps − 1."""
        highest = self.lr if self.lr is not None else (1e-3 if self.optimizer == "adamw" else 1.0 * (1 - self.momentum))
        if self.schedule == "constant":
            return highest
        rising = max(1, round(self.warmup * self.steps))
        return highest * min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising), 1.0)


# --- States and divergences -------------------------------------------------------------------------------------------


def encode_passages(model: CodiModel, passages: Sequence[str], max_tokens: int = 128) -> EncodedBatch:
    """Ordinary text as left-padded ids, no protocol tokens, cut after max_tokens."""
    rows = [list(ids)[:max_tokens] for ids in model.tokenizer(list(passages))["input_ids"]]
    if not rows or not all(rows):
        raise UserError("a passage must have at least one token, got an empty one")
    return left_padded(rows, model.pad_id).to(model.device)


@torch.no_grad()
def collect_states(
    model: CodiModel,
    questions: Sequence[str],
    positions: Sequence[int],
    text_tokens: int = 8,
    generator: torch.Generator | None = None,
    passages: Sequence[str] | None = None,
) -> States:
    """Hidden states of one batch of questions at the given positions.

    Args:
        model: the model.
        questions: one batch.
        positions: of TEXT, 0..n_latents.
        text_tokens, generator: which text tokens, see `text_states`.
        passages: ordinary text for position TEXT; None: the tokens of the questions themselves.
    """
    latents = [position for position in positions if position != TEXT]
    own_text = TEXT in positions and passages is None
    parts = []
    if latents or own_text:
        keep = ("hidden_states", "prompt_hidden_states") if own_text else ("hidden_states",)
        start = model.prefill(model.encode(questions), keep=keep)
        if latents:
            run = model.rollout(start, max(latents), keep=("hidden_states",))
            parts.append(latent_states(run, latents))
        if own_text:
            parts.append(text_states(start, text_tokens, len(model.protocol.before_latents), generator))
    if TEXT in positions and passages is not None:
        start = model.prefill(encode_passages(model, passages), keep=("prompt_hidden_states",))
        parts.append(text_states(start, text_tokens, 0, generator))
    return States.joined(parts)


def output_log_probs(lens: LatentLens, states: States) -> Tensor:
    """The model's own log-probabilities (row, vocab) at every row: the last state is not normed again."""
    return lens.unembed.unembedding(states.hidden[:, -1].float()).log_softmax(dim=-1)


@torch.no_grad()
def divergence_to_output(lens: LatentLens, states: States, budget: int = LOGIT_BUDGET) -> Tensor:
    """KL(model's own output ‖ lens) in nats.

    Returns:
        (row, layer 0..n_layers) float32, ≥ 0; the last column is zero.
    """
    size = max(1, budget // lens.unembed.unembedding.out_features)
    found = torch.zeros(len(states), lens.n_layers + 1)
    for start in range(0, len(states), size):
        rows = slice(start, start + size)
        part = States(states.hidden[rows], states.position[rows], states.prompt[rows])
        target = output_log_probs(lens, part)
        for layer in range(lens.n_layers):
            found[rows, layer] = _kl(target, lens.log_probs(part, layer)).clamp(min=0).cpu()
    return found


def _kl(target: Tensor, guess: Tensor) -> Tensor:
    """KL(target ‖ guess) over the last axis, both log-probabilities."""
    return (target.exp() * (target - guess)).sum(dim=-1)


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass
class _Translator:
    """One lens at one layer: its weights while training, its best weights, and how long it has not improved."""

    name: str
    layer: int
    module: nn.Linear
    best: dict[str, Tensor]
    divergence: float = float("inf")
    best_step: int = 0
    stalled: int = 0
    stopped: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}/{self.layer}"


class LensTraining:
    """Lenses in training.

    Args:
        model: never modified.
        lenses: name -> positions it is trained on (see `lens_positions`).
        options: how.
        passages: ordinary text as a function of the step, for lenses on TEXT; None: tokens of the questions.

    Attributes:
        lenses: name -> TunedLens; after `fit` with their best weights.
        positions: name -> positions.
        step: steps done.
        history: rows {"step", "lens", "layer", "loss", "validation"} of every look at the validation prompts.
    """

    def __init__(
        self,
        model: CodiModel,
        lenses: Mapping[str, Sequence[int]],
        options: TrainingOptions | None = None,
        passages: Questions | None = None,
    ) -> None:
        if not lenses:
            raise UserError("at least one lens must be named, got none")
        self.model, self.options, self.passages = model, options or TrainingOptions(), passages
        self.positions = {name: tuple(positions) for name, positions in lenses.items()}
        for name, positions in self.positions.items():
            if not positions:
                raise UserError(f"lens {name!r} has no positions to be trained on")
        self.unembed = unembed(model)
        first = new_lens(model, self.unembed)
        self.lenses: dict[str, TunedLens] = {}
        for name in self.positions:
            self.lenses[name] = first if not self.lenses else _another(first)
        self.translators = [
            _Translator(name, layer, lens[layer], _copied(lens[layer]))
            for name, lens in self.lenses.items()
            for layer in range(model.n_layers)
        ]
        weights = [weight for item in self.translators for weight in item.module.parameters()]
        o = self.options
        self.optimizer: torch.optim.Optimizer
        if o.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(weights, lr=1.0, betas=(o.momentum, 0.999), weight_decay=o.weight_decay)
        else:
            self.optimizer = torch.optim.SGD(
                weights, lr=1.0, momentum=o.momentum, nesterov=o.momentum > 0, weight_decay=o.weight_decay
            )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._losses: dict[str, list[float]] = {}

    @property
    def all_positions(self) -> tuple[int, ...]:
        """Every position that some lens needs, ascending."""
        return tuple(sorted({position for positions in self.positions.values() for position in positions}))

    @property
    def finished(self) -> bool:
        """Whether all steps are done or every translator has stopped."""
        return self.step >= self.options.steps or all(item.stopped for item in self.translators)

    def lens(self, name: str) -> LatentLens:
        """One of the lenses, used at every position."""
        return LatentLens(self.unembed, self.model.n_layers, self.lenses[name], name=name)

    def states(self, questions: Sequence[str], step: int) -> States:
        """States of one batch at every position that is needed; the choice of text tokens depends on seed and step."""
        generator = torch.Generator().manual_seed(abs(self.options.seed * 1_000_003 + 2 * step + (step < 0)))
        passages = None if self.passages is None or TEXT not in self.all_positions else self.passages(step)
        return collect_states(self.model, questions, self.all_positions, self.options.text_tokens, generator, passages)

    def update(self, questions: Sequence[str]) -> dict[str, float]:
        """One step on one batch.

        Returns:
            "lens/layer" -> mean KL (nats) before the step, of the translators that are still trained.
        """
        states = self.states(questions, self.step)
        plain = LatentLens(self.unembed, self.model.n_layers)
        with torch.no_grad():
            if self.options.target == "output":
                target = output_log_probs(plain, states)
            else:
                target = self.unembed(states.hidden[:, -1].float()).log_softmax(dim=-1)
        rows = {
            name: torch.isin(states.position, torch.tensor(positions, device=states.position.device)).nonzero()[:, 0]
            for name, positions in self.positions.items()
        }
        losses: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        size = max(1, LOGIT_BUDGET // self.model.vocab_size)
        for layer in range(self.model.n_layers):
            hidden = states.hidden[:, layer].float()
            active = [item for item in self.translators if item.layer == layer and not item.stopped]
            for pieces in _packed([(item, rows[item.name]) for item in active], size):
                inputs = [hidden[index] for _, index in pieces]
                moved = torch.cat([x + item.module(x) for (item, _), x in zip(pieces, inputs, strict=True)])
                guess = self.unembed(moved).log_softmax(dim=-1)
                divergences = _kl(target[torch.cat([index for _, index in pieces])], guess)
                total = divergences.new_zeros(())
                begin = 0
                for item, index in pieces:
                    loss = divergences[begin : begin + len(index)].sum() / len(rows[item.name])
                    total = total + loss
                    losses[item.key] = losses.get(item.key, 0.0) + float(loss.detach())
                    begin += len(index)
                total.backward()
        for item in self.translators:
            if not item.stopped:
                nn.utils.clip_grad_norm_(list(item.module.parameters()), self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        self.optimizer.step()
        self.step += 1
        for key, value in losses.items():
            self._losses.setdefault(key, []).append(value)
        return losses

    def validate(self, states: Sequence[States]) -> None:
        """Look at held-out states: keep the best weights of every translator, stop those that no longer improve."""
        for name in self.lenses:
            here = self.positions[name]
            parts = [divergence_to_output(self.lens(name), part.at(here)) for part in states]
            divergences = torch.cat(parts).double().mean(dim=0).tolist()
            for item in self.translators:
                if item.name != name:
                    continue
                value = divergences[item.layer]
                recent = self._losses.pop(item.key, [])
                self.history.append(
                    {
                        "step": self.step,
                        "lens": name,
                        "layer": item.layer,
                        "validation": value,
                        "loss": sum(recent) / len(recent) if recent else float("nan"),
                    }
                )
                if item.stopped:
                    continue
                if value < item.divergence or not self.options.early_stopping:
                    item.best, item.divergence, item.best_step = _copied(item.module), value, self.step
                    item.stalled = 0
                else:
                    item.stalled += 1
                    item.stopped = item.stalled >= self.options.patience

    def fit(
        self,
        questions: Questions,
        validation: Sequence[Sequence[str]],
        advance: Callable[[LensTraining], object] = lambda training: None,
    ) -> None:
        """Train to the end, from wherever it stands; the lenses then carry their best weights.

        Args:
            questions: the batch of a step, a function of the step alone.
            validation: batches of held-out questions, for early stopping. Their states are kept.
            advance: called after every step, for a progress bar or to save the state.

        Raises:
            ValueError: no validation questions.
        """
        if not validation:
            raise UserError("early stopping needs validation questions, got none")
        held_out = [self.states(batch, -1 - index) for index, batch in enumerate(validation)]
        if self.step == 0 and not self.history:
            self.validate(held_out)  # the untrained lens, that is the plain one, is a candidate
        while not self.finished:
            self.update(questions(self.step))
            if self.step % self.options.evaluate_every == 0 or self.step == self.options.steps:
                self.validate(held_out)
            advance(self)
        self.restore_best()

    def restore_best(self) -> None:
        """Give every translator its best weights."""
        for item in self.translators:
            item.module.load_state_dict(item.best)

    # --- Resume ---

    def save(self, path: str | Path) -> None:
        """Write everything that is needed to go on; a file that is there is replaced in one piece."""
        path = Path(path)
        state = {
            "identity": self._identity(),
            "step": self.step,
            "weights": {item.key: item.module.state_dict() for item in self.translators},
            "best": {item.key: item.best for item in self.translators},
            "progress": {
                item.key: [item.divergence, item.best_step, item.stalled, item.stopped] for item in self.translators
            },
            "losses": self._losses,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: str | Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to other lenses or options.
        """
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        if state["identity"] != self._identity():
            raise UserError(f"{path} was written with other lenses or training options")
        self.step = int(state["step"])
        for item in self.translators:
            item.module.load_state_dict(state["weights"][item.key])
            item.best = state["best"][item.key]
            item.divergence, item.best_step, item.stalled, item.stopped = state["progress"][item.key]
        self._losses, self.history = state["losses"], state["history"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _identity(self) -> dict[str, Any]:
        positions = {name: list(value) for name, value in self.positions.items()}
        return {"lenses": positions, "options": dataclasses.asdict(self.options), "d_model": self.model.d_model}


def _another(lens: TunedLens) -> TunedLens:
    """A copy of an untrained lens that shares its unembedding."""
    return copy.deepcopy(lens, {id(lens.unembed): lens.unembed})


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _packed(work: Sequence[tuple[_Translator, Tensor]], size: int) -> Iterator[list[tuple[_Translator, Tensor]]]:
    """The rows of every translator, cut and grouped so that a group has at most `size` rows."""
    group: list[tuple[_Translator, Tensor]] = []
    room = size
    for item, index in work:
        while len(index):
            taken, index = index[:room], index[room:]
            group.append((item, taken))
            room -= len(taken)
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group
