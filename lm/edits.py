"""Writing to the residual stream: x ← x + coefficient · vector at one layer, at chosen tokens, padding never.

`ResidualEdit` says what; `edited` puts edits in place around any forward pass or `generate` of Hugging Face and takes
them out again, also after an error; the token loop of this package (lm/generate.py, lm/steered.py) asks `edit_at` for
the edits of each pass. Prompt and generated tokens are told apart by columns: whatever is fed while the cache is empty
is the prompt, whatever follows is generated. Layers are those of `lm`: layer l is what block l hands on.

A coefficient of 0 leaves every bit as it is. The sum is taken in float32 (float64 for a float64 model) and rounded to
the model's dtype once.

Knows nothing about where vectors come from or whether they help::

    with edited(model, ResidualEdit(layer=15, vectors=vector, coefficients=0.5)):
        model.base.generate(**model.tokenizer(text, return_tensors="pt"))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lm.errors import UserError
from lm.forward import Edit
from lm.model import LanguageModel
from lm.terms import EditPositions

__all__ = ["Columns", "Editing", "ResidualEdit", "check_edits", "edit_at", "edited"]


@dataclass(frozen=True)
class ResidualEdit:
    """One change of the residual stream of a batch.

    Attributes:
        layer: 1..n_layers; what that block hands on is changed, the last one before the final norm.
        vectors: (row, d_model), or (d_model,) for all rows.
        coefficients: (row,), or one number for all rows. 0: the row is left as it is, bit for bit.
        positions: which tokens, see `lm.terms.EditPositions`.
        normalise: bring every edited state back to the norm it had before.

    Raises:
        ValueError: shapes that do not fit, unknown positions, or numbers that are not finite.
    """

    layer: int
    vectors: Tensor
    coefficients: Tensor | float
    positions: EditPositions = "all"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.positions not in get_args(EditPositions):
            raise UserError(f"positions must be one of {', '.join(get_args(EditPositions))}, got {self.positions!r}")
        coefficients = torch.as_tensor(self.coefficients)
        if self.vectors.dim() not in (1, 2) or coefficients.dim() > 1:
            raise UserError(
                "an edit takes vectors (row, d_model) or (d_model,) and coefficients (row,) or one number, got shapes "
                f"{tuple(self.vectors.shape)} and {tuple(coefficients.shape)}"
            )
        if len({size for size in (self._rows(self.vectors, 2), self._rows(coefficients, 1)) if size is not None}) > 1:
            raise UserError(
                f"an edit needs a vector and a coefficient per row, got {len(self.vectors)} and {len(coefficients)}"
            )
        if not (bool(self.vectors.isfinite().all()) and bool(coefficients.isfinite().all())):
            raise UserError("vectors and coefficients of an edit must be finite numbers")

    @staticmethod
    def _rows(x: Tensor, dims: int) -> int | None:
        return len(x) if x.dim() == dims else None

    @property
    def rows(self) -> int | None:
        """Rows that the edit is made for; None: any number of them."""
        by_vector = self._rows(self.vectors, 2)
        return self._rows(torch.as_tensor(self.coefficients), 1) if by_vector is None else by_vector

    def select(self, rows: Tensor | Sequence[int]) -> ResidualEdit:
        """The edit of the given rows, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        coefficients = torch.as_tensor(self.coefficients)
        return replace(
            self,
            vectors=self.vectors[index.to(self.vectors.device)] if self.vectors.dim() == 2 else self.vectors,
            coefficients=coefficients[index.to(coefficients.device)] if coefficients.dim() else self.coefficients,
        )

    def to(self, device: str | torch.device) -> ResidualEdit:
        """The edit on another device."""
        coefficients = self.coefficients
        moved = coefficients.to(device) if isinstance(coefficients, Tensor) else coefficients
        return replace(self, vectors=self.vectors.to(device), coefficients=moved)

    def apply(self, x: Tensor, where: Tensor | None = None) -> Tensor:
        """The residual stream (row, position, d_model) after the edit, a new tensor.

        Args:
            x: before it.
            where: (row, position) bool, which tokens; None: all.
        """
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        coefficients = torch.as_tensor(self.coefficients, dtype=exact, device=x.device).reshape(-1, 1, 1)
        vectors = self.vectors.to(x.device, exact).reshape(-1, 1, x.shape[-1])
        before = x.to(exact)
        after = before + coefficients * vectors
        if self.normalise:
            norms = after.norm(dim=-1, keepdim=True)
            after = torch.where(norms > 0, after * (before.norm(dim=-1, keepdim=True) / norms), after)
        touched = coefficients != 0
        return torch.where(touched if where is None else touched & where[..., None], after.to(x.dtype), x)


def check_edits(model: LanguageModel, edits: Sequence[ResidualEdit], rows: int) -> None:
    """Raise ValueError if edits do not fit a model and a batch of `rows` rows."""
    for edit in edits:
        if not 1 <= edit.layer <= model.n_layers:
            raise UserError(f"layer of an edit must be in 1..{model.n_layers}, got {edit.layer}")
        if edit.vectors.shape[-1] != model.d_model:
            raise UserError(f"vectors of an edit must have width {model.d_model}, got {edit.vectors.shape[-1]}")
        if edit.rows not in (None, rows):
            raise UserError(f"an edit made for {edit.rows} rows was given a batch of {rows}")


# --- Which tokens -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The tokens of one pass within their texts.

    Attributes:
        start, width: the first column of the pass, and how many there are.
        prompt: columns of the prompt, padding included; what is behind them is generated.
        mask: (row, column) bool, True at real tokens, at least the columns up to the end of the pass; None: all real.
    """

    start: int
    width: int
    prompt: int
    mask: Tensor | None = None

    def chosen(self, positions: EditPositions, device: torch.device) -> Tensor | None | bool:
        """Which tokens of the pass: (row or 1, token) bool; None all, False none."""
        end = self.start + self.width
        if (positions in ("prompt", "last") and self.start >= self.prompt) or (
            positions in ("generated", "once") and end <= self.prompt
        ):
            return False
        real = None if self.mask is None else self.mask[:, self.start : end].bool()
        columns = torch.arange(self.start, end, device=device)[None]
        if positions == "all" or (positions == "answer" and self.start >= self.prompt):
            return real
        if positions in ("last", "answer"):
            # The last real token, wherever padding stands.
            later = columns >= self.prompt if positions == "answer" else torch.zeros_like(columns, dtype=torch.bool)
            if self.mask is None or real is None:
                return later | (columns == self.prompt - 1)
            given = self.mask[:, : self.prompt].long()
            last = (given * torch.arange(1, given.shape[1] + 1, device=given.device)).argmax(dim=1)
            return (later | (columns == last[:, None])) & real
        if positions == "once":
            where = columns == self.prompt
        else:
            where = columns < self.prompt if positions == "prompt" else columns >= self.prompt
        return where if real is None else where & real


def edit_at(edits: Sequence[ResidualEdit], columns: Columns) -> Edit | None:
    """What is done to the residual stream in one pass, for `lm.forward.feed`; None: nothing.

    Args:
        edits: with as many rows as the pass; those of one layer are applied one after the other.
        columns: the tokens of the pass.
    """
    by_layer: dict[int, list[tuple[ResidualEdit, Tensor | None]]] = {}
    for edit in edits:
        where = columns.chosen(edit.positions, edit.vectors.device)
        if where is not False:
            assert where is not True
            by_layer.setdefault(edit.layer, []).append((edit, where))
    if not by_layer:
        return None

    def change(layer: int, x: Tensor) -> Tensor:
        for edit, where in by_layer.get(layer, ()):
            x = edit.apply(x, None if where is None else where.to(x.device))
        return x

    return change


class Editing:
    """Edits of a batch whose tokens are fed pass by pass and whose rows can leave.

    Args:
        edits: with as many rows as the batch.
        prompt: columns of the prompt.
        fed: columns that have been fed already.
    """

    def __init__(self, edits: Sequence[ResidualEdit], prompt: int, fed: int = 0) -> None:
        self._edits, self._prompt, self._fed = list(edits), prompt, fed

    def next(self, width: int, mask: Tensor | None = None) -> Edit | None:
        """For the next `width` columns; mask (row, column so far) as in `Columns`."""
        edit = edit_at(self._edits, Columns(self._fed, width, self._prompt, mask))
        self._fed += width
        return edit

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows."""
        self._edits = [edit.select(rows) for edit in self._edits]


# --- Around code of others --------------------------------------------------------------------------------------------


class _Watch:
    """What the decoder is fed, pass by pass: where the prompt ends and what is edited now."""

    def __init__(self, model: LanguageModel, edits: Sequence[ResidualEdit]) -> None:
        self.model, self.edits = model, edits
        self.edit: Edit | None = None
        self.prompt = 0
        self.fed: Tensor | None = None  # by the last pass without a cache
        self.signature = inspect.signature(type(model.decoder).forward)

    def begin(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        named = dict(self.signature.bind_partial(module, *args, **given).arguments)
        named |= named.pop("kwargs", {})
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise UserError("edits need a pass over input_ids or inputs_embeds")
        mask = named.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise UserError("edits need an attention mask (batch, position), to leave padding as it is")
        rows, width = tokens.shape[:2]
        check_edits(self.model, self.edits, rows)
        past = named.get("past_key_values")
        start = 0 if past is None else int(past.get_seq_length())
        if start == 0 and not self._goes_on(tokens, past):
            self.prompt = width
        elif start and width > 1 and any(edit.positions != "all" for edit in self.edits):
            raise UserError(
                f"{width} tokens were fed after a cache that holds {start}: whether they are of the prompt cannot "
                "be told, so edits must have positions all here"
            )
        self.fed = tokens if past is None else None
        self.edit = edit_at(self.edits, Columns(start, width, self.prompt, mask))

    def _goes_on(self, tokens: Tensor, past: Any) -> bool:
        """Without a cache a text is fed anew for each token: the text of the pass before, and one token more."""
        before = self.fed
        if past is not None or before is None or tokens.dtype != before.dtype or len(tokens) != len(before):
            return False
        return tokens.shape[1] == before.shape[1] + 1 and torch.equal(tokens[:, :-1], before)

    def change(self, layer: int, output: Any) -> Any:
        if self.edit is None:
            return None
        x = output if isinstance(output, Tensor) else output[0]
        changed = self.edit(layer, x)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


@contextmanager
def edited(model: LanguageModel, edits: ResidualEdit | Sequence[ResidualEdit]) -> Iterator[None]:
    """While inside, every pass of the model is edited, whoever runs it; afterwards the model is as before.

    A pass with an empty cache, or with none, starts a new prompt, except where it repeats the pass before it with one
    token more (generation without a cache). Edits with rows need batches of just as many rows.

    Args:
        model: the model.
        edits: one or several, also of one layer; blocks nested inside each other add up.

    Raises:
        ValueError: edits that do not fit the model or what is fed, or an attention mask that is not (batch, position).
    """
    edits = [edits] if isinstance(edits, ResidualEdit) else list(edits)
    for edit in edits:
        check_edits(model, [edit], edit.rows or 0)
    watch = _Watch(model, [edit.to(model.device) for edit in edits])

    def hook(layer: int) -> Any:
        return lambda module, args, output: watch.change(layer, output)

    handles = []
    try:
        handles.append(model.decoder.register_forward_pre_hook(watch.begin, with_kwargs=True))
        for layer in sorted({edit.layer for edit in edits}):
            handles.append(model.blocks[layer - 1].register_forward_hook(hook(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
