"""Logit lens and tuned lens over latents × layers, on tuned_lens's `TunedLens`, `LogitLens` and `Unembed`.

What a lens does to the state x of layer l at one position:

    plain    logits = unembedding(final norm(x))                         l < n_layers
    tuned    logits = unembedding(final norm(x + W_l x + b_l))           l < n_layers, one translator per layer
    both     logits = unembedding(x)                                     l = n_layers: x is normed already, never again

so at the last layer every lens is the model itself, and a tuned lens with zero weights is the plain one. Everything is
computed in float32, whatever the dtype of the model.

Positions: 0 is the begin-of-thought token, 1..n the latents, TEXT (-1) a token of ordinary text. A `LatentLens` says
which translators are used at which position: the same everywhere, or one set per position.

A lens is saved as the folder that `TunedLens.from_model_and_pretrained(model.base, folder)` reads (config.json and
params.pt); what tuned_lens has no field for (positions, checkpoint, training) stands beside it in positions.json. For
base models that tuned_lens does not know (Qwen, Mistral) its loader needs our `unembed(model)`:
`TunedLens.from_unembed_and_pretrained(unembed(model), folder)`.

Knows nothing about training, prompts or figures.

Source: logit lens, nostalgebraist 2020; tuned lens, Belrose et al. 2023, arXiv 2303.08112.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tuned_lens.nn import LogitLens, TunedLens, TunedLensConfig, Unembed

from codi.rollout import LatentRollout, Prefill
from lm.errors import UserError
from lm.model import LanguageModel

__all__ = [
    "TEXT",
    "LatentLens",
    "States",
    "latent_states",
    "lens_positions",
    "load_lenses",
    "new_lens",
    "save_lens",
    "text_states",
    "unembed",
]

TEXT = -1
"""Position of a token of ordinary text."""
POSITIONS_FILE = "positions.json"

Numbering = Literal["latent", "published"]


# --- Reading out ------------------------------------------------------------------------------------------------------


class _Unembed(Unembed):
    """tuned_lens's Unembed, from parts instead of a model class it has to know."""

    def __init__(self, norm: nn.Module, unembedding: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.final_norm = copy.deepcopy(norm).float()
        self.unembedding = copy.deepcopy(unembedding).float()
        self.requires_grad_(False)


def unembed(model: LanguageModel) -> Unembed:
    """Final norm and unembedding of a model as a float32 copy: (…, d_model) before the norm -> logits (…, vocab).

    The same numbers as `tuned_lens.nn.Unembed(model.base)` in float32, for every base model whose norm is found.

    Raises:
        ValueError: no final norm is found (see `lm.model.LanguageModel`), or an unembedding that is not linear.
    """
    unembedding = model.unembedding
    if not isinstance(unembedding, nn.Linear):
        raise UserError(f"lenses need a linear unembedding, {model.name} has a {type(unembedding).__name__}")
    return _Unembed(model.final_norm, unembedding).eval()


@dataclass(frozen=True)
class States:
    """Hidden states of many positions, one row each.

    Attributes:
        hidden: (row, layer 0..n_layers, d_model); the last layer is already normed.
        position: (row,) 0 = begin of thought, 1..n = latents, TEXT = text token.
        prompt: (row,) index of the prompt in its batch.
    """

    hidden: Tensor
    position: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, positions: Sequence[int]) -> States:
        """The rows at the given positions, order kept."""
        rows = torch.isin(self.position, torch.tensor(list(positions), device=self.position.device))
        return States(self.hidden[rows], self.position[rows], self.prompt[rows])

    @staticmethod
    def joined(parts: Sequence[States]) -> States:
        """All rows of several, in order."""
        return States(
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.position for part in parts]),
            torch.cat([part.prompt for part in parts]),
        )


def latent_states(run: LatentRollout, positions: Sequence[int] | None = None) -> States:
    """States of h_0's position and of the latents of a run, position by position.

    Args:
        run: a rollout that kept its hidden states.
        positions: of 0..n; None: all.

    Raises:
        ValueError: the run has not kept its hidden states, or does not have such a position.
    """
    if run.hidden_states is None or run.bot_hidden_states is None:
        raise ValueError("the run must have kept its hidden states: rollout(..., keep=('hidden_states', …))")
    wanted = range(run.n_latents + 1) if positions is None else positions
    parts = []
    for position in wanted:
        if not 0 <= position <= run.n_latents:
            raise ValueError(f"position must be in 0..{run.n_latents} (0: begin of thought), got {position}")
        hidden = run.bot_hidden_states if position == 0 else run.hidden_states[:, position - 1]
        index = torch.arange(len(run), device=hidden.device)
        parts.append(States(hidden, torch.full_like(index, position), index))
    return States.joined(parts)


def text_states(prefill: Prefill, per_prompt: int, leave: int = 0, generator: torch.Generator | None = None) -> States:
    """States of tokens of the prompts, a seeded choice of each prompt's.

    Args:
        prefill: prompts that kept "prompt_hidden_states".
        per_prompt: tokens per prompt, drawn without replacement (fewer where a prompt has fewer).
        leave: how many tokens at the end of every prompt are left out (the protocol's own).
        generator: of the draw, on the CPU; None: the last tokens that are not left out.
    """
    if prefill.prompt_hidden_states is None:
        raise ValueError("the prefill must have kept its states: prefill(..., keep=('prompt_hidden_states',))")
    if per_prompt < 1:
        raise ValueError(f"per_prompt must be at least 1 token, got {per_prompt}")
    mask = prefill.attention_mask.cpu()
    rows, places = [], []
    for index, real in enumerate(mask):
        found = real.nonzero()[:, 0]
        found = found[: max(len(found) - leave, 1)]
        if generator is not None:
            found = found[torch.randperm(len(found), generator=generator)[:per_prompt].sort().values]
        places.append(found[-per_prompt:])
        rows.append(torch.full_like(places[-1], index))
    device = prefill.state.device
    row, place = torch.cat(rows).to(device), torch.cat(places).to(device)
    return States(prefill.prompt_hidden_states[row, place], torch.full_like(row, TEXT), row)


class LatentLens:
    """A lens for latents: which translators read which position.

    Args:
        unembed: of the model, from `unembed(model)`.
        n_layers: blocks of the model; states of layer n_layers are read without norm.
        lenses: nothing (the plain logit lens); one TunedLens for every position; or position -> TunedLens.
        name: for tables and figures.

    Attributes:
        positions: the positions it reads, or None: any.
    """

    def __init__(
        self,
        unembed: Unembed,
        n_layers: int,
        lenses: TunedLens | Mapping[int, TunedLens] | None = None,
        name: str = "plain",
    ) -> None:
        self.unembed = unembed
        self.n_layers = n_layers
        self.name = name
        self._plain = LogitLens(unembed)
        self._everywhere = lenses if isinstance(lenses, TunedLens) else None
        self._by_position = dict(lenses) if isinstance(lenses, Mapping) else {}
        self.positions = tuple(sorted(self._by_position)) or None
        for lens in [*self._by_position.values(), *([self._everywhere] if self._everywhere is not None else [])]:
            if len(lens) != n_layers:
                raise UserError(f"lens {name!r} has {len(lens)} layers, the model has {n_layers}")

    @classmethod
    def plain(cls, model: LanguageModel) -> LatentLens:
        """The logit lens of a model."""
        return cls(unembed(model), model.n_layers)

    @property
    def is_plain(self) -> bool:
        """Whether it is the logit lens."""
        return self._everywhere is None and not self._by_position

    def reads(self, position: int) -> bool:
        """Whether it has translators for a position."""
        return self.positions is None or position in self.positions

    def lens(self, position: int) -> LogitLens | TunedLens:
        """tuned_lens's lens at a position.

        Raises:
            ValueError: this lens has nothing for that position.
        """
        if self.is_plain:
            return self._plain
        if self._everywhere is not None:
            return self._everywhere
        if position not in self._by_position:
            known = ", ".join(map(str, self.positions or ()))
            raise UserError(f"lens {self.name!r} reads positions {known}, not {position} ({position_name(position)})")
        return self._by_position[position]

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer <= self.n_layers:
            raise ValueError(f"layer must be in 0..{self.n_layers}, got {layer}")

    def logits(self, hidden: Tensor, layer: int, position: int) -> Tensor:
        """Logits (…, vocab) float32 of states (…, d_model) of `layer` 0..n_layers at a position."""
        self._check_layer(layer)
        hidden = hidden.float()
        if layer == self.n_layers:
            return self.unembed.unembedding(hidden)
        return self.lens(position)(hidden, layer)

    def log_probs(self, states: States, layer: int) -> Tensor:
        """Log-probabilities (row, vocab), nats, of every row by the lens of its position."""
        logits = states.hidden.new_empty(len(states), self.unembed.unembedding.out_features, dtype=torch.float32)
        for position in states.position.unique().tolist():
            rows = states.position == position
            logits[rows] = self.logits(states.hidden[rows, layer], layer, position)
        return logits.log_softmax(dim=-1)

    def difference_logits(self, difference: Tensor, layer: int, position: int, bias: bool = False) -> Tensor:
        """Logits of a difference of states, such as mean_A − mean_B.

        The translator's bias cancels in T(x) − T(y), so it is left out: (I + W) d, then norm (except at the last layer)
        and unembedding. `bias=True` treats the difference as if it were a state, as the published difference lens did.

        Args:
            difference: (…, d_model).
            layer: 0..n_layers.
            position: whose translators are used (of a lens per position: that of A).
            bias: keep the translator's bias.
        """
        self._check_layer(layer)
        difference = difference.float()
        lens = self.lens(position)
        if layer == self.n_layers:
            return self.unembed.unembedding(difference)
        if isinstance(lens, TunedLens) and not bias:
            difference = difference + difference @ lens[layer].weight.T
            return self.unembed(difference)
        return lens(difference, layer)


def position_name(position: int) -> str:
    """Words for a position."""
    return {TEXT: "a token of ordinary text", 0: "the begin-of-thought token"}.get(position, f"latent {position}")


# --- Which positions a lens is trained on -----------------------------------------------------------------------------


def lens_positions(name: str, n_latents: int, numbering: Numbering = "latent") -> tuple[int, ...]:
    """Positions that a lens of this name is trained on.

    Names: "all" (latents 1..n), "odd", "even", a latent ("3"), several ("3 and 5", "3,5", "1 3 5"), "text" (tokens of
    ordinary text), "0" (the begin-of-thought token). The published lenses were named in this project's numbering but
    trained with 0-based steps, so the lens called "3" saw latent 4 and "odd" saw latents 2, 4, 6; the prefix
    "published" (or numbering="published") gives that reading: "published 3" is latent 4.

    Args:
        name: see above; case and extra spaces do not matter.
        n_latents: n of the model.
        numbering: "latent" (1..n) or "published" (0-based steps).

    Returns:
        Positions, ascending.

    Raises:
        ValueError: an unknown name, or a latent that the model does not have.
    """
    given = " ".join(name.lower().replace("-", " ").split())
    if given.startswith("published "):
        numbering, given = "published", given.removeprefix("published ")
    shift = 1 if numbering == "published" else 0
    steps = range(1 - shift, n_latents + 1 - shift)
    if given == "text":
        return (TEXT,)
    if given == "all":
        return tuple(range(1, n_latents + 1))
    if given in ("odd", "even"):
        return tuple(step + shift for step in steps if step % 2 == (given == "odd"))
    words = [word for word in re.split(r"[ ,]|\band\b", given) if word]
    if not words or not all(word.isdigit() for word in words):
        raise UserError(
            f"a lens is named each, all, odd, even, text, a latent or several ('3 and 5'), with 'published ' in front "
            f"for 0-based steps; got {name!r}"
        )
    numbers = sorted({int(word) for word in words})
    allowed = range(0, n_latents + 1) if not shift else steps
    wrong = [number for number in numbers if number not in allowed]
    if wrong:
        raise UserError(f"lens {name!r}: {wrong[0]} is not in {allowed[0]}..{allowed[-1]}")
    return tuple(number + shift for number in numbers)


def new_lens(model: LanguageModel, unembed: Unembed) -> TunedLens:
    """An untrained lens: zero translators (the plain lens), float32, sharing `unembed`."""
    config = TunedLensConfig(
        base_model_name_or_path=model.base.config.name_or_path or model.name,
        d_model=model.d_model,
        num_hidden_layers=model.n_layers,
    )
    lens = TunedLens(unembed, config)
    return lens.to(next(unembed.parameters()).device)


# --- Files ------------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """Folder name of a lens: "3 and 5" -> "3-and-5"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save_lens(lens: TunedLens, folder: str | Path, name: str, positions: Sequence[int], **record: Any) -> None:
    """Write a lens as a folder that tuned_lens's own loader reads, with positions.json beside.

    Args:
        lens: trained.
        folder: made if it does not exist.
        name: of the lens.
        positions: it was trained on.
        record: whatever else should stand in positions.json (JSON values).
    """
    folder = Path(folder)
    lens.save(folder)
    content = {"name": name, "positions": list(positions), **record}
    (folder / POSITIONS_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class SavedLens:
    """A lens read from its folder: translators, name, positions it was trained on, and its record."""

    lens: TunedLens
    name: str
    positions: tuple[int, ...]
    record: dict[str, Any]


def load_lenses(folder: str | Path, model: LanguageModel, unembed: Unembed) -> dict[str, SavedLens]:
    """Every lens of a folder of lenses (or the one lens that the folder is).

    Args:
        folder: that `codi lens train` wrote, its lenses/ (one folder per lens), or a single lens.
        model: that the lenses are for.
        unembed: of that model.

    Raises:
        ValueError: no lens there, a damaged one, or one for another model (size, layers or unembedding).
    """
    folder = Path(folder)
    if (folder / "lenses").is_dir():
        folder = folder / "lenses"
    candidates = [folder] if (folder / "config.json").is_file() else sorted(folder.glob("*/"))
    candidates = [path for path in candidates if (path / "config.json").is_file() and (path / "params.pt").is_file()]
    if not candidates:
        raise UserError(f"{folder} holds no lens (a folder with config.json and params.pt): run codi lens train first")
    expected = unembed.unembedding_hash()
    found: dict[str, SavedLens] = {}
    for path in candidates:
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            beside = path / POSITIONS_FILE
            record = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        size = (config.get("d_model"), config.get("num_hidden_layers"))
        if size != (model.d_model, model.n_layers):
            raise UserError(
                f"{path} is a lens for d_model {size[0]} and {size[1]} layers, "
                f"{model.name} has {model.d_model} and {model.n_layers}"
            )
        if config.get("unembed_hash") not in (None, expected):
            raise UserError(f"{path} was trained for another model: its unembedding is not that of {model.name}")
        lens = TunedLens.from_unembed_and_pretrained(unembed, str(path), map_location=model.device, weights_only=True)
        name = record.pop("name", path.name)
        positions = tuple(record.pop("positions", ()))
        lens = lens.to(model.device).requires_grad_(False).eval()
        found[name] = SavedLens(lens, name, positions, record)
    return found


def choose_lens(name: str, saved: Mapping[str, SavedLens], model: LanguageModel, unembed: Unembed) -> LatentLens:
    """A LatentLens by name: "plain", "each" (at every position the lens trained on it alone), or one saved lens
    used at every position.

    Raises:
        ValueError: no such lens; the ones that are there are listed.
    """
    if name == "plain":
        return LatentLens(unembed, model.n_layers)
    if name == "each":
        single = {item.positions[0]: item.lens for item in saved.values() if len(item.positions) == 1}
        # a published name may mean one latent too; the lens that is named after its position goes first
        single |= {item.positions[0]: item.lens for item in saved.values() if item.name == str(item.positions[0])}
        single.pop(TEXT, None)
        if not single:
            raise UserError(f"no lens was trained on a single latent; there are: {', '.join(saved) or 'none'}")
        return LatentLens(unembed, model.n_layers, single, name="each")
    known = {slug(key): item for key, item in saved.items()}
    if slug(name) not in known:
        raise UserError(f"no lens {name!r}; there are: {', '.join(['plain', *saved])}")
    item = known[slug(name)]
    return LatentLens(unembed, model.n_layers, item.lens, name=item.name)
