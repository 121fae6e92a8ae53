"""THE token loop: from the states of a past to the tokens that follow, greedy or drawn, checked against drafts or not.

A *past* is whatever rows remember: `OwnPast`, a cache per row, or `SharedPast`, prefixes that rows share. The loop is
the same for both. Rows that are finished leave, logits are computed only where they are read, and a row's tokens depend
on nothing but its own past and its own uniform numbers: not on its neighbours, on when they finish, or on drafts.

Knows nothing about what the tokens mean::

    generate(model, ["Once upon a time"], max_new_tokens=20).texts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lm.cache import BranchCache, build_cache, clone_cache, select_cache
from lm.edits import Editing, ResidualEdit, check_edits
from lm.errors import UserError
from lm.forward import feed
from lm.model import LanguageModel
from lm.stops import StopStrings
from lm.text import EncodedBatch, to_text

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = [
    "Generated",
    "OwnPast",
    "Past",
    "Rules",
    "SharedPast",
    "as_lists",
    "as_texts",
    "exclude",
    "generate",
    "most_probable",
    "write_tokens",
]


@dataclass(frozen=True)
class Generated:
    """What was written after a batch of texts.

    Attributes:
        tokens: per row, the ids before the end of text (which is not included).
        texts: the same as text, special tokens left out.
        finished: per row, whether the end of text came before the limit.
        first_logits: (batch, vocab) at the first new position, nothing excluded; None if not asked for.
    """

    tokens: list[list[int]]
    texts: list[str]
    finished: list[bool]
    first_logits: Tensor | None = None


# --- Choosing ---------------------------------------------------------------------------------------------------------


def exclude(logits: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """Logits (…, vocab) with some ids at -inf; a new tensor if there are any."""
    if not len(ids):
        return logits
    return logits.index_fill(-1, torch.as_tensor(ids, dtype=torch.long, device=logits.device), float("-inf"))


def most_probable(logits: Tensor) -> Tensor:
    """(row,) index of the largest of each row's logits (row, vocab), the first if several are; as argmax, but faster.

    On CPUs argmax visits numbers one by one (bfloat16: longer than the product that made them). The largest number of
    each block of 64 is found many at a time, and only the best block is searched.
    """
    rows, vocab = logits.shape
    whole = vocab // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or not whole or not rows:
        return logits.argmax(dim=-1)
    blocks = logits[:, :whole].unflatten(1, (-1, _BLOCK))
    largest, block = blocks.amax(dim=2).max(dim=1)
    index = blocks[torch.arange(rows), block].argmax(dim=1) + block * _BLOCK
    if whole < vocab:
        value, last = logits[:, whole:].max(dim=1)
        index = torch.where(value > largest, last + whole, index)
    return index


_BLOCK = 64


def _among(tokens: Tensor, ids: Tensor) -> Tensor:
    """Whether each token is one of a few ids."""
    return (tokens[..., None] == ids).any(dim=-1)


def _drawn(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """(row,) tokens drawn from softmax(logits / temperature), each by its own uniform number in [0, 1)."""
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    drawn = uniform.to(logits.device).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen and when a row is finished.

    Attributes:
        max_new_tokens: at most this many per row, 1 or more.
        end_ids: any of these ends a row.
        excluded: ids that are never chosen.
        temperature: 0 is greedy; otherwise logits are divided by it and tokens are drawn.
        uniforms: (row, max_new_tokens) in [0, 1), one per draw; needed (and used) above temperature 0.
        stops: texts that end a row too; the tokens that make one are written.

    Raises:
        ValueError: a limit below 1, a temperature below 0, drawing without uniforms or with too few.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    excluded: tuple[int, ...] = ()
    temperature: float = 0.0
    uniforms: Tensor | None = None
    stops: StopStrings | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.temperature > 0 and self.uniforms is None:
            raise UserError("a temperature above 0 needs a seeded generator or uniforms")

    @classmethod
    def of(
        cls,
        size: int,
        max_new_tokens: int,
        end_ids: tuple[int, ...],
        excluded: tuple[int, ...] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
    ) -> Rules:
        """Rules for `size` rows, the uniforms drawn from a generator on the CPU if they are not given."""
        if temperature > 0 and max_new_tokens >= 1:
            if uniforms is None and generator is not None:
                uniforms = torch.rand(size, max_new_tokens, generator=generator, dtype=torch.float64)
            if uniforms is not None and uniforms.shape != (size, max_new_tokens):
                raise UserError(f"uniforms must be ({size}, {max_new_tokens}), got {tuple(uniforms.shape)}")
        return cls(max_new_tokens, end_ids, excluded, temperature, uniforms)


# --- Pasts ------------------------------------------------------------------------------------------------------------


class Past(Protocol):
    """What the rows of a batch remember. It grows by what is fed; rows can leave."""

    def feed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Last states (row, token, d_model) of embeddings (row, token, d_model) at position ids (row, token)."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, ascending."""
        ...


class OwnPast:
    """A cache for every row, with the mask of its past.

    Args:
        model: the model.
        cache: of the past; not modified.
        mask: (row, position) bool, True at real tokens.
        look: mask of all rows, finished ones included -> what is seen of it, None: everything. Default: the mask
            itself.
        editing: of what is fed; None: nothing is edited.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: DynamicCache,
        mask: Tensor,
        look: Callable[[Tensor], Tensor | None] | None = None,
        editing: Editing | None = None,
    ) -> None:
        self._model, self._cache, self._mask, self._look = model, clone_cache(cache), mask, look
        self._editing = editing
        self._rows = torch.arange(len(mask), device=mask.device)

    def feed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """See `Past`; ValueError if the model has too few positions."""
        self._model.check_length(int(positions.max()) + 1)
        new = self._mask.new_ones(len(self._mask), embeddings.shape[1])
        self._mask = torch.cat((self._mask, new), dim=1)
        seen = self._mask if self._look is None else self._look(self._mask)
        seen = None if seen is None else seen[self._rows]
        edit = None if self._editing is None else self._editing.next(embeddings.shape[1])
        return feed(self._model, embeddings, self._cache, seen, positions, edit).last

    def select(self, rows: Tensor) -> None:
        """See `Past`."""
        self._cache = select_cache(self._cache, rows)
        self._rows = self._rows[rows]
        if self._editing is not None:
            self._editing.select(rows)


class SharedPast:
    """Prefixes that rows share; to be used inside `lm.cache.branch_attention`.

    Args:
        model: the model.
        cache: prefixes and own slots.
        editing: of what is fed; None: nothing is edited.
    """

    def __init__(self, model: LanguageModel, cache: BranchCache, editing: Editing | None = None) -> None:
        self._model, self.cache, self._editing = model, cache, editing

    def feed(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """See `Past`."""
        self.cache.positions = positions
        edit = None if self._editing is None else self._editing.next(embeddings.shape[1])
        return feed(self._model, embeddings, self.cache, None, positions, edit).last

    def select(self, rows: Tensor) -> None:
        """See `Past`."""
        self.cache.select(rows)
        if self._editing is not None:
            self._editing.select(rows)

    def forget(self, hidden: Tensor) -> None:
        """Leave some of the newest slots out of the past of their rows; hidden (row, slot) bool."""
        self.cache.hide_own(hidden)


class _Chooser:
    """`Rules` at work."""

    def __init__(self, rules: Rules, device: torch.device) -> None:
        self._rules = rules
        self._end = torch.tensor(rules.end_ids, dtype=torch.long, device=device)
        self._excluded = torch.tensor(rules.excluded, dtype=torch.long, device=device)
        given = None if rules.temperature == 0 else rules.uniforms
        self._uniforms = None if given is None else given.to(device)

    def choose(self, logits: Tensor, rows: Tensor, places: Tensor | int) -> Tensor:
        """(row,) next tokens of some rows, by logits (row, vocab), at places of their texts."""
        logits = exclude(logits, self._excluded)
        if self._uniforms is None:
            return most_probable(logits)
        return _drawn(logits, self._rules.temperature, self._uniforms[rows, places])

    def going_on(self, tokens: Tensor, count: Tensor) -> Tensor:
        """(row,) whether rows are not finished, by the tokens (row, limit) that they have and how many these are."""
        latest = tokens.gather(1, count[:, None] - 1)[:, 0]
        goes_on = ~_among(latest, self._end) & (count < self._rules.max_new_tokens)
        if self._rules.stops is not None:
            lists = zip(tokens[:, : int(count.max())].tolist(), count.tolist(), strict=True)
            ended = [self._rules.stops.ended(row[:length]) for row, length in lists]
            goes_on &= ~torch.tensor(ended, dtype=torch.bool, device=goes_on.device)
        return goes_on


# --- The loop ---------------------------------------------------------------------------------------------------------


def write_tokens(
    model: LanguageModel,
    past: Past,
    states: Tensor,
    position: Tensor,
    rules: Rules,
    *,
    begun: Tensor | None = None,
    drafts: Tensor | None = None,
    packing: float = 1.0,
    keep_first_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens that follow a past.

    Args:
        model: the model.
        past: of the rows; used up.
        states: (row, 1 + draft, d_model) last states that predict the tokens to be chosen: of the last token of the
            past, and of the tokens of a draft that was fed after it.
        position: (row,) position id of token 0.
        rules: how tokens are chosen.
        begun: (row, token) tokens 0, 1, … that were chosen and fed already, none of which ended its row; None: none.
        drafts: (row, draft) the tokens of that draft, -1 behind its end. They are checked in one go and forgotten from
            the first that is not chosen on; needs a past that can forget. Does not change tokens.
        packing: finished rows leave when less than this share of the rows is still being written (1: at once).
        keep_first_logits: also return the first logits.

    Returns:
        tokens (row, max_new_tokens) with the one that ended the row, -1 after it; (row, vocab), at the first token
        that was chosen here, or None.
    """
    device, size, limit = states.device, len(states), rules.max_new_tokens
    chooser = _Chooser(rules, device)
    checked = torch.empty(size, 0, dtype=torch.long, device=device) if drafts is None else drafts
    tokens = torch.full((size, limit), -1, dtype=torch.long, device=device)
    start = 0 if begun is None else begun.shape[1]
    if begun is not None:
        tokens[:, :start] = begun

    first_logits = None
    going = torch.arange(size, device=device)  # rows whose draft has been right so far
    for step in range(checked.shape[1] + 1):
        logits = model.logits(states[going, step])
        if step == 0 and keep_first_logits:
            first_logits = logits
        chosen = chooser.choose(logits, going, start + step)
        tokens[going, start + step] = chosen
        if step < checked.shape[1]:
            going = going[chosen == checked[going, step]]
            if len(going) == 0:
                break

    count = tokens.ge(0).sum(1)
    alive = chooser.going_on(tokens, count).nonzero()[:, 0]
    if len(alive) and checked.shape[1]:
        # Tokens of a draft that were fed but not chosen are no part of the past.
        assert isinstance(past, SharedPast), "drafts need a past that can forget"
        ahead = torch.arange(checked.shape[1], device=device)
        past.forget(ahead[None, :] >= (count - start - 1)[:, None])
    rows = torch.arange(size, device=device)  # the row of `tokens` that each row of the past is
    while len(alive):
        if len(alive) < packing * len(rows):
            past.select(alive)
            rows, alive = rows[alive], torch.arange(len(alive), device=device)
        # Finished rows that have not left are fed something and not read.
        at = count[rows].clamp(max=limit - 1)
        positions = (position[rows] + at - 1)[:, None]
        states = past.feed(model.embed(tokens[rows, at - 1][:, None]), positions)[:, 0]
        read = rows[alive]
        chosen = chooser.choose(model.logits(states[alive]), read, count[read])
        tokens[read, count[read]] = chosen
        count[read] += 1
        alive = alive[chooser.going_on(tokens[read], count[read])]
    return tokens, first_logits


def as_lists(tokens: Tensor, end_ids: Sequence[int]) -> tuple[list[list[int]], list[bool]]:
    """Tokens from `write_tokens` as lists without the end of text; per row, whether it came."""
    ended = _among(tokens, torch.tensor(list(end_ids), device=tokens.device))
    lengths = (tokens.ge(0) & ~ended).sum(1)
    lists = [ids[:length] for ids, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return lists, ended.any(1).tolist()


# --- Plain texts ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: LanguageModel,
    texts: Sequence[str] | EncodedBatch,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    end_ids: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    edits: ResidualEdit | Sequence[ResidualEdit] = (),
    batch_size: int = 64,
    keep_first_logits: bool = False,
) -> Generated:
    """Go on with texts, in batches of similar length; results in the order of the texts.

    Args:
        model: the model.
        texts: used as they are, or encoded already.
        max_new_tokens: at most this many tokens per text.
        temperature: 0 is greedy; above 0 a seed is needed.
        seed: of the draws. What is written depends on seed and place in `texts`, not on batch_size.
        end_ids: tokens that end a text; None: the model's own.
        stop: texts that end what is written as soon as it holds one of them; the text ends before it, the tokens hold
            what was written of it.
        edits: of the residual stream; a row each for every text where they have rows.
        batch_size: texts at once.
        keep_first_logits: also return the logits at the first new position.
    """
    batch = texts if isinstance(texts, EncodedBatch) else model.encode(texts)
    given_edits = [edits] if isinstance(edits, ResidualEdit) else list(edits)
    check_edits(model, given_edits, len(batch))
    ends = model.end_ids if end_ids is None else tuple(end_ids)
    stops = StopStrings(model.tokenizer, stop) if len(stop) else None
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rules = Rules.of(len(batch), max_new_tokens, ends, temperature=temperature, generator=generator)
    tokens: list[list[int]] = [[] for _ in range(len(batch))]
    finished = [False] * len(batch)
    first_logits: Tensor | None = None
    for rows, given in batch.parts(batch_size):
        part = given.to(model.device)
        mask, cache, width = part.attention_mask.bool(), build_cache(), part.input_ids.shape[1]
        model.check_length(width)
        own_edits = [edit.select(rows) if edit.rows else edit for edit in given_edits]
        editing = Editing([edit.to(model.device) for edit in own_edits], prompt=width)
        embeddings = model.embed(part.input_ids)
        states = feed(model, embeddings, cache, mask, part.positions, editing.next(width, mask)).last[:, -1:]
        chosen = None if rules.uniforms is None else rules.uniforms[rows.cpu()]
        written, logits = write_tokens(
            model,
            OwnPast(model, cache, mask, editing=editing),
            states,
            part.positions[:, -1] + 1,
            replace(rules, uniforms=chosen, stops=stops),
            keep_first_logits=keep_first_logits,
        )
        if logits is not None:
            first_logits = logits.new_zeros(len(batch), logits.shape[1]) if first_logits is None else first_logits
            first_logits[rows.to(logits.device)] = logits
        for row, ids, done in zip(rows.tolist(), *as_lists(written, ends), strict=True):
            tokens[row], finished[row] = ids, done
    return Generated(tokens, *as_texts(model, tokens, finished, stops), first_logits)


def as_texts(
    model: LanguageModel, tokens: Sequence[Sequence[int]], finished: Sequence[bool], stops: StopStrings | None = None
) -> tuple[list[str], list[bool]]:
    """Texts of what was written, cut before a stop string, and whether each is finished; "" without a tokenizer."""
    texts = [to_text(model.tokenizer, ids) if model.tokenizer is not None else "" for ids in tokens]
    if stops is None:
        return texts, list(finished)
    cut = [stops.cut(text) for text in texts]
    return cut, [done or len(short) < len(text) for done, short, text in zip(finished, cut, texts, strict=True)]
