"""The grid of steering: many texts under many edits of the residual stream, all rows in common batches.

A *cell* is one vector at one layer with one coefficient; a *row* is one text under one cell. Rows come in chunks, so
memory does not grow with the grid. Coefficient 0 is the unsteered model, bit for bit, and is run once per text.

Knows nothing about where vectors come from, answers or statistics::

    for rows in steer_cells(model, model.encode(texts), vectors, [Cell(15, 0, 1.0), Cell(15, 0, -1.0)]):
        kl = divergence(rows.reference, rows.first_logits)          # one per row: text rows.rows, cell rows.cells
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from lm.cache import build_cache, select_cache
from lm.edits import Editing, ResidualEdit
from lm.errors import UserError
from lm.generate import OwnPast, Past, Rules, as_lists, as_texts, write_tokens
from lm.model import LanguageModel
from lm.partial import Stem, above, below, join_caches
from lm.stops import StopStrings
from lm.tails import Tail, can_share, extend
from lm.terms import EditPositions, Engine
from lm.text import EncodedBatch

__all__ = ["Cell", "Steered", "steer_cells"]

_TEXTS = 16  # fewest texts of a part: their unsteered states are kept while their rows are run


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
    engine: Engine | None = None,
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
        engine: how rows go on from a prompt that no edit has touched: over one copy of its cache for all of them, or
            over a copy each; None: shared wherever the model's attention allows it. Same numbers.

    Raises:
        ValueError: vectors of another shape or that are not finite, cells that name a layer or vector that there is
            not, no cells, or what `lm.generate.generate` refuses.
    """
    _check(model, vectors, cells, positions)
    engine = engine or ("shared" if can_share(model) else "clones")
    rules = _rules(model, len(batch), max_new_tokens, temperature, seed, end_ids, stop)
    cells = list(cells)
    yield from _Grid(model, vectors, cells, positions, normalise, rules, keep_logits, batch_size, engine).run(batch)


def _check(model: LanguageModel, vectors: Tensor, cells: Sequence[Cell], positions: str) -> None:
    shape = (model.n_layers + 1, model.d_model)
    if vectors.dim() != 3 or vectors.shape[1:] != shape:
        raise UserError(f"vectors must be (vector, {shape[0]}, {shape[1]}), got {tuple(vectors.shape)}")
    if not bool(vectors.isfinite().all()):
        raise UserError("vectors must be finite numbers")
    if positions not in get_args(EditPositions):
        raise UserError(f"positions must be one of {', '.join(get_args(EditPositions))}, got {positions!r}")
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
    """The grid of one call, text part by text part.

    Every part is run unsteered first, through all layers: the reference, and the stem that all cells go on from. What
    an edit leaves as it was is not computed again:

        the prompt is edited          blocks above the layer over the whole prompt, per row
        only its last token is        blocks above the layer over that token, per row
        only generated tokens are     the first of them is chosen once per text and is the last token of a longer prompt

    Tokens after that are fed through all blocks, row by row: over a prompt that rows share where it was not edited.
    """

    model: LanguageModel
    vectors: Tensor
    cells: list[Cell]
    positions: EditPositions
    normalise: bool
    rules: Rules | None
    keep_logits: bool
    batch_size: int
    engine: Engine

    def run(self, batch: EncodedBatch) -> Iterator[Steered]:
        """All rows."""
        zero = [i for i, cell in enumerate(self.cells) if cell.coefficient == 0]
        by_layer: dict[int, list[int]] = {}
        for i, cell in enumerate(self.cells):
            if cell.coefficient != 0:
                by_layer.setdefault(cell.layer, []).append(i)
        fewest = min(map(len, by_layer.values()), default=1)
        at_once = min(self.batch_size, max(_TEXTS, -(-self.batch_size // fewest)))
        for texts, part in batch.parts(at_once):
            texts = texts.cpu()
            limit = 0 if self.rules is None else self.rules.max_new_tokens
            self.model.check_length(part.input_ids.shape[1] + max(limit - 1, 0))
            plain = self._unsteered(part, texts, sorted(by_layer))
            yield from self._same(plain, zero, range(len(texts)))
            for layer, chosen in sorted(by_layer.items()):
                yield from self._layer(plain, layer, chosen)

    # The unsteered texts

    def _unsteered(self, part: EncodedBatch, texts: Tensor, layers: list[int]) -> _Plain:
        stem = below(self.model, part, layers, to_top=True)
        assert stem.last is not None
        states = stem.last[:, -1]
        uniforms = None if self.rules is None or self.rules.uniforms is None else self.rules.uniforms[texts]
        plain = _Plain(texts, stem, None, uniforms)
        if self.rules is None:
            plain.logits = self.model.logits(states) if self.keep_logits else None
            return plain
        whole = any(cell.coefficient == 0 for cell in self.cells)
        rules = replace(self.rules, uniforms=uniforms)
        if not whole and self.positions in ("generated", "once"):  # the first token is all that is needed
            rules = replace(rules, max_new_tokens=1, uniforms=None if uniforms is None else uniforms[:, :1])
        elif not whole:
            plain.logits = self.model.logits(states) if self.keep_logits else None
            return plain
        past = OwnPast(self.model, stem.cache, stem.batch.attention_mask.bool())
        after = stem.batch.positions[:, -1] + 1
        plain.tokens, plain.logits = write_tokens(
            self.model, past, states[:, None], after, rules, keep_first_logits=self.keep_logits
        )
        return plain

    def _same(self, plain: _Plain, cells: Sequence[int], at: Sequence[int]) -> Iterator[Steered]:
        """Rows of cells under which texts (of the part) are as unsteered."""
        for start in range(0, len(cells) * len(at), self.batch_size):
            chosen = list(itertools.product(cells, at))[start : start + self.batch_size]
            row = torch.tensor([text for _, text in chosen])
            written = None if plain.tokens is None else plain.tokens[row.to(plain.tokens.device)]
            logits = None if plain.logits is None else plain.logits[row.to(plain.logits.device)]
            yield self._rows(plain, torch.tensor([cell for cell, _ in chosen]), row, logits, written)

    # Steered rows

    def _layer(self, plain: _Plain, layer: int, cells: list[int]) -> Iterator[Steered]:
        """All cells of a layer on the texts of a part."""
        going: Sequence[int] = range(len(plain.texts))
        stem, begun = plain.stem, None
        if self.positions in ("generated", "once"):
            if self.rules is None:  # nothing that is read comes after an edited token
                yield from self._same(plain, cells, going)
                return
            assert plain.tokens is not None
            going = self._going_on(plain)
            over = [text for text in range(len(plain.texts)) if text not in set(going)]
            yield from self._same(plain, cells, over)
            if not going:
                return
            stem, begun = plain.longer(self.model), plain.tokens[:, :1]
        grid = torch.tensor(list(itertools.product(going, cells)))  # rows of a text stand together
        for chosen in grid.split(self.batch_size):
            row, cell = chosen[:, 0], chosen[:, 1]
            written, logits = self._steered(plain, stem, begun, layer, row, cell)
            if begun is not None:
                logits = None if plain.logits is None else plain.logits[row.to(plain.logits.device)]
            yield self._rows(plain, cell, row, logits, written)

    def _going_on(self, plain: _Plain) -> list[int]:
        """Texts of the part that do not end with their first token."""
        assert self.rules is not None and plain.tokens is not None
        first = plain.tokens[:, 0].tolist()
        stops = self.rules.stops
        ends = [token in self.rules.end_ids or (stops is not None and stops.ended([token])) for token in first]
        return [text for text, over in enumerate(ends) if not over and self.rules.max_new_tokens > 1]

    def _steered(
        self, plain: _Plain, stem: Stem, begun: Tensor | None, layer: int, row: Tensor, cell: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens and first logits of rows of one layer."""
        device, prompt = self.model.device, plain.stem.batch.input_ids.shape[1]
        chosen = [self.cells[i] for i in cell.tolist()]
        vectors = self.vectors[[one.vector for one in chosen], layer].to(device)
        coefficients = torch.tensor([one.coefficient for one in chosen], dtype=torch.float64, device=device)
        edit = ResidualEdit(layer, vectors, coefficients, self.positions, self.normalise)
        row = row.to(device)
        width = stem.batch.input_ids.shape[1]
        if self.positions in ("all", "prompt"):
            editing = Editing([edit], prompt)
            cache = None if self.rules is None else build_cache()
            change = editing.next(width, stem.batch.attention_mask[row].bool())
            states = above(self.model, stem, layer, row, edit=change, cache=cache)[:, -1:]
            if cache is None:
                return self._write(None, states, begun, plain, row)
            joined = join_caches(select_cache(stem.cache, row), cache, layer)
            past = OwnPast(self.model, joined, stem.batch.attention_mask[row].bool(), editing=editing)
            return self._write(past, states, begun, plain, row)
        editing = Editing([edit], prompt, fed=width - 1)
        longest = prompt + (0 if self.rules is None else self.rules.max_new_tokens)
        with Tail(self.model, stem, layer, row, editing, self.engine, longest) as tail:
            return self._write(tail.past, tail.states, begun, plain, row)

    def _write(
        self, past: Past | None, states: Tensor, begun: Tensor | None, plain: _Plain, row: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.rules is None:
            return None, self.model.logits(states[:, 0]) if self.keep_logits else None
        assert past is not None
        uniforms = None if plain.uniforms is None else plain.uniforms[row.cpu()]
        position = plain.stem.batch.positions[row, -1] + 1
        return write_tokens(
            self.model, past, states, position, replace(self.rules, uniforms=uniforms),
            begun=None if begun is None else begun[row], keep_first_logits=self.keep_logits,
        )  # fmt: skip

    def _rows(
        self, plain: _Plain, cells: Tensor, row: Tensor, logits: Tensor | None, written: Tensor | None
    ) -> Steered:
        reference = None if plain.logits is None else plain.logits[row.to(plain.logits.device)]
        if self.rules is None or written is None:
            size = len(row)
            return Steered(cells, plain.texts[row], logits, reference, [[] for _ in row], [""] * size, [False] * size)
        tokens, done = as_lists(written, self.rules.end_ids)
        texts, finished = as_texts(self.model, tokens, done, self.rules.stops)
        return Steered(cells, plain.texts[row], logits, reference, tokens, texts, finished)


@dataclass
class _Plain:
    """Unsteered texts: which, the pass over them, their uniform numbers, what they write, their next-token logits."""

    texts: Tensor
    stem: Stem
    tokens: Tensor | None
    uniforms: Tensor | None
    logits: Tensor | None = None
    _longer: Stem | None = None

    def longer(self, model: LanguageModel) -> Stem:
        """The stem of the texts with their first token behind them (0 after texts that end there: never gone on)."""
        if self._longer is None:
            assert self.tokens is not None
            self._longer = extend(model, self.stem, self.tokens[:, 0])
        return self._longer
