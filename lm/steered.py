"""The grid of steering: many texts under many edits of the residual stream, all rows in common batches.

A *cell* is one vector at one layer with one coefficient; a *row* is one text under one cell. Rows come in chunks, so
memory does not grow with the grid. Coefficient 0 is the unsteered model, bit for bit, and is run once per text.

Knows nothing about where vectors come from, answers or statistics::

    for rows in steer_cells(model, model.encode(texts), vectors, [Cell(15, 0, 1.0), Cell(15, 0, -1.0)]):
        kl = divergence(rows.reference, rows.first_logits)          # one per row: text rows.rows, cell rows.cells
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm.cache import build_cache
from lm.edits import Editing, ResidualEdit, check_edits
from lm.errors import UserError
from lm.forward import feed
from lm.generate import OwnPast, Rules, as_lists, as_texts, write_tokens
from lm.model import LanguageModel
from lm.stops import StopStrings
from lm.terms import EditPositions
from lm.text import EncodedBatch

__all__ = ["Cell", "Steered", "steer_cells"]


@dataclass(frozen=True)
class Cell:
    """One edit: layer 1..n_layers, index of the vector, coefficient (0: the unsteered model)."""

    layer: int
    vector: int
    coefficient: float


@dataclass(frozen=True)
class Steered:
    """Some rows of the grid.

    Attributes:
        cells: (row,) index of each row's cell, on the CPU.
        rows: (row,) index of each row's text in the batch, on the CPU.
        first_logits: (row, vocab) at the first new position, nothing excluded; None if not asked for.
        reference: (row, vocab) the same of the unsteered model; None if not asked for.
        tokens: per row, the ids before the end of text; empty lists if nothing was to be written.
        texts: the same as text, cut before a stop string.
        finished: per row, whether the end of text or a stop string came before the limit.
    """

    cells: Tensor
    rows: Tensor
    first_logits: Tensor | None
    reference: Tensor | None
    tokens: list[list[int]]
    texts: list[str]
    finished: list[bool]

    def __len__(self) -> int:
        return len(self.cells)


@torch.no_grad()
def steer_cells(
    model: LanguageModel,
    batch: EncodedBatch,
    vectors: Tensor,
    cells: Sequence[Cell],
    positions: EditPositions = "all",
    *,
    normalise: bool = False,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    seed: int | None = None,
    end_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    keep_logits: bool = True,
    batch_size: int = 64,
) -> Iterator[Steered]:
    """Every text under every cell, in chunks of rows; each pair comes once, in no promised order.

    Args:
        model: the model.
        batch: the texts.
        vectors: (vector, n_layers + 1, d_model); a cell takes the row of its layer. Row 0 is never used.
        cells: the edits.
        positions: which tokens are edited.
        normalise: bring edited states back to the norm they had.
        max_new_tokens: tokens to write at most; 0: only the logits at the first new position.
        temperature: 0 is greedy; above 0 a seed is needed.
        seed: of the draws. They belong to the text: every cell of a text uses the same ones, whatever the batch is.
        end_ids: tokens that end a text; None: the model's own.
        stop: texts that end what is written, see `lm.generate.generate`.
        keep_logits: give first_logits and reference.
        batch_size: rows at once.

    Raises:
        ValueError: vectors of another shape or that are not finite, cells that name a layer or vector that there is
            not, no cells, or what `lm.generate.generate` refuses.
    """
    _check(model, vectors, cells)
    grid = _Grid(
        model, batch, vectors, list(cells), positions, normalise, max_new_tokens, keep_logits, batch_size,
        rules=_rules(model, len(batch), max_new_tokens, temperature, seed, end_ids, stop),
    )  # fmt: skip
    yield from grid.run()


def _check(model: LanguageModel, vectors: Tensor, cells: Sequence[Cell]) -> None:
    shape = (model.n_layers + 1, model.d_model)
    if vectors.dim() != 3 or vectors.shape[1:] != shape:
        raise UserError(f"vectors must be (vector, {shape[0]}, {shape[1]}), got {tuple(vectors.shape)}")
    if not cells:
        raise UserError("a grid needs at least one cell, got none")
    for cell in cells:
        if not 1 <= cell.layer <= model.n_layers:
            raise UserError(f"layer of a cell must be in 1..{model.n_layers}, got {cell.layer}")
        if not 0 <= cell.vector < len(vectors):
            raise UserError(f"vector of a cell must be in 0..{len(vectors) - 1}, got {cell.vector}")
        if not math.isfinite(cell.coefficient):
            raise UserError(f"coefficient of a cell must be a finite number, got {cell.coefficient}")


def _rules(
    model: LanguageModel,
    size: int,
    limit: int,
    temperature: float,
    seed: int | None,
    end_ids: Sequence[int] | None,
    stop: Sequence[str],
) -> Rules | None:
    """How texts are written; None: nothing is."""
    if limit == 0:
        return None
    ends = model.end_ids if end_ids is None else tuple(end_ids)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rules = Rules.of(size, limit, ends, temperature=temperature, generator=generator)
    return replace(rules, stops=StopStrings(model.tokenizer, stop)) if len(stop) else rules


@dataclass
class _Grid:
    model: LanguageModel
    batch: EncodedBatch
    vectors: Tensor
    cells: list[Cell]
    positions: EditPositions
    normalise: bool
    limit: int
    keep_logits: bool
    batch_size: int
    rules: Rules | None

    def run(self) -> Iterator[Steered]:
        zero = torch.tensor([i for i, cell in enumerate(self.cells) if cell.coefficient == 0], dtype=torch.long)
        others = [i for i, cell in enumerate(self.cells) if cell.coefficient != 0]
        others.sort(key=lambda i: self.cells[i].layer)
        for texts, given in self.batch.parts(self.batch_size):
            texts, part = texts.cpu(), given.to(self.model.device)
            self.model.check_length(part.input_ids.shape[1] + max(self.limit - 1, 0))
            plain = self._rows(part, texts, [])
            if len(zero):
                yield from self._repeated(zero, texts, plain)
            for start in range(0, len(others) * len(texts), self.batch_size):
                row = torch.arange(start, min(start + self.batch_size, len(others) * len(texts)))
                cell, at = torch.tensor(others)[row // len(texts)], row % len(texts)
                found = self._rows(part.select(at), texts[at], self._edits(cell))
                reference = None if plain.first_logits is None else plain.first_logits[at.to(part.input_ids.device)]
                yield replace(found, cells=cell, reference=reference)

    def _edits(self, cells: Tensor) -> list[ResidualEdit]:
        """One edit per layer that occurs among the rows; rows of other layers have coefficient 0 in it."""
        chosen = [self.cells[i] for i in cells.tolist()]
        edits = []
        for layer in sorted({cell.layer for cell in chosen}):
            coefficients = torch.tensor([cell.coefficient if cell.layer == layer else 0.0 for cell in chosen])
            vectors = self.vectors[[cell.vector for cell in chosen], layer]
            edits.append(ResidualEdit(layer, vectors, coefficients, self.positions, self.normalise))
        check_edits(self.model, edits, len(chosen))
        return [edit.to(self.model.device) for edit in edits]

    def _rows(self, part: EncodedBatch, texts: Tensor, edits: Sequence[ResidualEdit]) -> Steered:
        mask, cache, width = part.attention_mask.bool(), build_cache(), part.input_ids.shape[1]
        editing = Editing(edits, prompt=width)
        embeddings = self.model.embed(part.input_ids)
        states = feed(self.model, embeddings, cache, mask, part.positions, editing.next(width, mask)).last[:, -1:]
        cells = torch.full_like(texts, -1)
        if self.rules is None:
            logits = self.model.logits(states[:, 0]) if self.keep_logits else None
            nothing: list[list[int]] = [[] for _ in texts]
            return Steered(cells, texts, logits, None, nothing, [""] * len(texts), [False] * len(texts))
        uniforms = None if self.rules.uniforms is None else self.rules.uniforms[texts]
        written, first = write_tokens(
            self.model,
            OwnPast(self.model, cache, mask, editing=editing),
            states,
            part.positions[:, -1] + 1,
            replace(self.rules, uniforms=uniforms),
            keep_first_logits=self.keep_logits,
        )
        tokens, done = as_lists(written, self.rules.end_ids)
        return Steered(cells, texts, first, None, tokens, *as_texts(self.model, tokens, done, self.rules.stops))

    def _repeated(self, cells: Tensor, texts: Tensor, plain: Steered) -> Iterator[Steered]:
        """The unsteered rows once for every cell with coefficient 0."""
        for cell in cells.tolist():
            yield replace(plain, cells=torch.full_like(texts, cell), reference=plain.first_logits)
