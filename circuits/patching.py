"""Activation patching: what of a clean run, put into a corrupted one, brings its prediction back; and the other way.

    E = (KL(clean ‖ corrupted) − KL(clean ‖ patched)) / KL(clean ‖ corrupted)      ratio of means over items

"denoise" puts clean numbers into the corrupted run: 1 is full recovery, 0 none. "noise" puts corrupted numbers into the
clean run: 1 is as much damage as the corruption itself does. The same for the probability of the target and for the
logit difference between the target and what the corrupted text asks for.

Sites: one query head's z before W_O ("head"), all query heads of a key/value head ("group"), a whole attention layer,
an MLP, or the residual stream at one position; at all positions or at the last. Clean and corrupted text have the same
number of tokens, so a position is a position in both.

What bounds the time: with "all", every patched head makes its block and those above compute every token from the first
exchanged one on, which is half of the model over that many tokens on average; with "last", one token.

Knows nothing about tasks: token ids come from the caller. Source: Meng et al. 2022, arXiv 2202.05262 (denoising); Dutta
et al. 2024, arXiv 2402.18312 (E per head, all positions); Heimersheim and Nanda 2024, arXiv 2404.15255 (both ways).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from circuits.heads import Heads
from circuits.upper import Ground, Upper, shared_prefixes
from lm.cache import build_cache
from lm.errors import UserError
from lm.forward import feed
from lm.text import left_padded

__all__ = ["Direction", "Measure", "Patched", "Positions", "Probe", "Site", "measures", "patch", "patch_set"]

Site = Literal["head", "group", "attention", "mlp", "residual"]
Positions = Literal["all", "last"]
Direction = Literal["denoise", "noise"]
Measure = Literal["kl", "logit_difference", "probability"]

_ENOUGH_TOKENS = 256
"""Tokens at once from which on more of them make a pass no cheaper per token."""


@dataclass(frozen=True)
class Probe:
    """A clean and a corrupted text, after each of which a word is predicted.

    Attributes:
        clean, corrupted: token ids, equally many; at least one.
        target: id of the right next token of the clean text.
        other: id of the one that the corrupted text asks for.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    target: int
    other: int

    def __post_init__(self) -> None:
        if len(self.clean) != len(self.corrupted) or not self.clean:
            raise UserError(
                f"clean and corrupted text must have equally many tokens, got {len(self.clean)} and "
                f"{len(self.corrupted)}"
            )

    @property
    def changed(self) -> int:
        """First position where the texts differ; the last one where they do not."""
        differing = (i for i, (a, b) in enumerate(zip(self.clean, self.corrupted, strict=True)) if a != b)
        return next(differing, len(self.clean) - 1)


@dataclass(frozen=True)
class Patched:
    """What patching every unit of every block did to the prediction.

    Attributes:
        site, positions, direction: as asked for.
        blocks: numbers of the blocks (1..n), of layers (0..n) for the residual stream.
        values: measure -> (block, unit, probe) float64. Units: heads, groups, or one; for the residual stream the
            positions, the last one last, where those before the first exchanged token change nothing.
        clean, corrupted: measure -> (probe,) of the runs without a patch; KL of the clean one is 0.
        logits: (block, unit, probe, vocab), only if asked for.
    """

    site: Site
    positions: Positions
    direction: Direction
    blocks: tuple[int, ...]
    values: dict[Measure, Tensor]
    clean: dict[Measure, Tensor]
    corrupted: dict[Measure, Tensor]
    logits: Tensor | None = None

    def gains(self, measure: Measure = "kl") -> tuple[Tensor, Tensor]:
        """Numerators (block, unit, probe) and denominators (probe,) of the effect, to be averaged or resampled over
        probes before they are divided."""
        if measure not in get_args(Measure):
            raise UserError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
        start, end = self.corrupted[measure], self.clean[measure]
        if self.direction == "noise":
            start, end = end, start
        return self.values[measure] - start, end - start

    def effect(self, measure: Measure = "kl") -> Tensor:
        """(block, unit) E, ratio of means over probes; nan where the corruption changes nothing on average."""
        gained, whole = self.gains(measure)
        return gained.mean(dim=-1) / whole.mean()


def measures(logits: Tensor, clean: Tensor, target: Tensor, other: Tensor) -> dict[Measure, Tensor]:
    """Measures (row,) in float64 of next-token logits (row, vocab) against those of the clean run.

    Args:
        logits, clean: (row, vocab).
        target, other: (row,) token ids.
    """
    logits, clean = logits.double(), clean.double()
    found, expected = logits.log_softmax(-1), clean.log_softmax(-1)
    at = torch.arange(len(logits), device=logits.device)
    return {
        "kl": (expected.exp() * (expected - found)).sum(-1).cpu(),
        "logit_difference": (logits[at, target] - logits[at, other]).cpu(),
        "probability": found[at, target].exp().cpu(),
    }


# --- One site after the other -----------------------------------------------------------------------------------------


def patch(
    heads: Heads,
    probes: Sequence[Probe],
    site: Site = "head",
    positions: Positions = "all",
    direction: Direction = "denoise",
    blocks: Sequence[int] | None = None,
    tokens_at_once: int = 2048,
    columns_at_once: int = 4096,
    keep_logits: bool = False,
    advance: Callable[[int], object] | None = None,
) -> Patched:
    """Patch every unit of every block, one at a time.

    Args:
        heads: of the model.
        probes: at least one. Those whose clean text is the beginning of another one's share its pass.
        site, positions, direction: see this module.
        blocks: numbers of blocks, of layers 0..n for the residual stream; None: all.
        tokens_at_once: of patched rows; bounds memory and changes nothing else.
        columns_at_once: of texts and prefixes held at once; likewise.
        keep_logits: also return all logits.
        advance: called with the number of patched runs that were done.

    Raises:
        ValueError: an unknown name, no probes, or blocks that the model does not have.
    """
    for name, value, allowed in (("site", site, Site), ("positions", positions, Positions),
                                 ("direction", direction, Direction)):  # fmt: skip
        if value not in get_args(allowed):
            raise UserError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
    if not probes:
        raise UserError("patching needs at least one probe, got none")
    first = 0 if site == "residual" else 1
    wanted = tuple(range(first, heads.n_blocks + 1)) if blocks is None else tuple(blocks)
    for number in wanted:
        if not first <= number <= heads.n_blocks:
            raise UserError(f"blocks must be in {first}..{heads.n_blocks} for the site {site!r}, got {number}")
    job = _Job(heads, list(probes), site, positions, direction, wanted, tokens_at_once, columns_at_once, keep_logits)
    for bucket in job.buckets():
        job.patch_bucket(bucket, advance)
    return job.result()


@dataclass
class _Bucket:
    """Probes that run together: their places, how many of their last tokens run, and what comes before these."""

    probes: list[int]
    tokens: int
    clean: Ground
    corrupted: Ground


class _Job:
    """One call of `patch`."""

    def __init__(
        self, heads: Heads, probes: list[Probe], site: Site, positions: Positions, direction: Direction,
        blocks: tuple[int, ...], tokens_at_once: int, columns_at_once: int, keep_logits: bool,
    ) -> None:  # fmt: skip
        self.heads, self.probes, self.site, self.positions = heads, probes, site, positions
        self.direction, self.blocks = direction, blocks
        self.tokens_at_once, self.columns_at_once = tokens_at_once, columns_at_once
        self.needed = [len(probe.clean) - probe.changed for probe in probes]
        self.units = {"head": heads.n_heads, "group": len(heads.groups), "attention": 1, "mlp": 1}.get(
            site, 1 if positions == "last" else max(self.needed)
        )
        names: tuple[Measure, ...] = get_args(Measure)
        shape = (len(blocks), self.units, len(probes))
        self.values: dict[Measure, Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
        self.ends: dict[Direction, dict[Measure, Tensor]] = {
            "noise": {name: torch.zeros(len(probes), dtype=torch.float64) for name in names},
            "denoise": {name: torch.zeros(len(probes), dtype=torch.float64) for name in names},
        }  # where each direction begins: of the clean and of the corrupted run
        self.logits: Tensor | None = torch.zeros(*shape, heads.model.vocab_size) if keep_logits else None

    def result(self) -> Patched:
        return Patched(
            self.site, self.positions, self.direction, self.blocks, self.values, self.ends["noise"],
            self.ends["denoise"], self.logits,
        )  # fmt: skip

    # Who runs together

    def _texts(self) -> Iterator[tuple[list[tuple[int, ...]], list[tuple[int, int]]]]:
        """Texts that are held at once, with their probes as (probe, text): every clean text is one of these or the
        beginning of one."""
        texts: list[tuple[int, ...]] = []
        owner: list[tuple[int, int]] = []
        for i in sorted(range(len(self.probes)), key=lambda i: self.probes[i].clean, reverse=True):
            clean = self.probes[i].clean  # in this order a text comes right after one that it is the beginning of
            if not texts or texts[-1][: len(clean)] != clean:
                width = max(len(clean), *map(len, texts)) if texts else len(clean)
                if texts and width * (len(texts) + 1) > self.columns_at_once:
                    yield texts, owner
                    texts, owner = [], []
                texts.append(clean)
            owner.append((i, len(texts) - 1))
        yield texts, owner

    def buckets(self) -> Iterator[_Bucket]:
        model = self.heads.model
        for texts, owner in self._texts():
            batch = left_padded(texts, model.pad_id).to(model.device)
            cache = build_cache()
            with torch.no_grad():
                feed(model, model.embed(batch.input_ids), cache, batch.attention_mask, batch.positions)
            width = batch.input_ids.shape[1]
            for members in self._split(owner):
                tokens = max(self.needed[i] for i, _ in members)
                rows = torch.tensor([text for _, text in members], device=model.device)
                starts = [width - len(texts[text]) + len(self.probes[i].clean) - tokens for i, text in members]
                prefix, mask = shared_prefixes(
                    cache, batch.attention_mask, rows, torch.tensor(starts, device=model.device)
                )
                ids = [
                    torch.tensor([getattr(self.probes[i], name)[-tokens:] for i, _ in members], device=model.device)
                    for name in ("clean", "corrupted")
                ]
                clean, corrupted = (Ground(self.heads, prefix, mask, x, mlp=self.site == "mlp") for x in ids)
                yield _Bucket([i for i, _ in members], tokens, clean, corrupted)

    def _split(self, owner: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Probes in groups that need about as many tokens, longest first."""
        found: list[tuple[int, int]] = []
        for member in sorted(owner, key=lambda member: -self.needed[member[0]]):
            i = member[0]
            if found:
                most = self.needed[found[0][0]]
                longest = max(len(self.probes[j].clean) for j, _ in [*found, member])
                run = 1 if self.positions == "last" else most  # tokens of a patched row
                full = len(found) * self.units * run >= _ENOUGH_TOKENS and self.needed[i] < 0.75 * most
                if full or longest * (len(found) + 1) > self.columns_at_once or len(self.probes[i].clean) < most:
                    yield found
                    found = []
            found.append(member)
        yield found

    # Patching

    def patch_bucket(self, bucket: _Bucket, advance: Callable[[int], object] | None) -> None:
        base, source = bucket.corrupted, bucket.clean
        if self.direction == "noise":
            base, source = source, base
        at = torch.tensor(bucket.probes)
        self._note(self.ends["noise"], bucket.clean.logits, bucket, at)
        self._note(self.ends["denoise"], bucket.corrupted.logits, bucket, at)
        tokens = 1 if self.positions == "last" else bucket.tokens
        units = min(self.units, tokens) if self.site == "residual" else self.units
        for name in self.values:  # where nothing can change
            self.values[name][:, :, at] = self.ends[self.direction][name][at]
        if self.logits is not None:
            self.logits[:, :, at] = base.logits.cpu().to(self.logits.dtype)
        together = max(1, min(units, self.tokens_at_once // (tokens * len(bucket.probes))))
        together = -(-units // -(-units // together))
        upper = base.upper(together, tokens)
        for place, block in enumerate(self.blocks):
            for start in range(0, units, together):
                chosen = [min(start + k, units - 1) for k in range(together)]
                logits = self._run(upper, base, source, block, chosen, tokens)
                new = units - start if start + together > units else together
                logits = logits.unflatten(0, (len(at), together))[:, :new]
                for k in range(new):
                    unit = self.units - units + chosen[k]  # positions: counted from the end
                    for name, value in self._measured(logits[:, k], bucket).items():
                        self.values[name][place, unit, at] = value
                    if self.logits is not None:
                        self.logits[place, unit, at] = logits[:, k].cpu().to(self.logits.dtype)
                if advance is not None:
                    advance(new * len(at))

    def _run(self, upper: Upper, base: Ground, source: Ground, block: int, chosen: list[int], tokens: int) -> Tensor:
        """Logits (row, vocab) of the chosen units of a block, the units of a probe side by side."""
        k, n = len(chosen), len(base)
        if self.site == "residual":
            x = base.x[:, -tokens:, block, None].transpose(1, 2).repeat(1, k, 1, 1)  # (probe, unit, token, d_model)
            for j, unit in enumerate(chosen):
                x[:, j, unit] = source.x[:, -tokens:, block][:, unit]
            return upper.from_residual(block, x.flatten(0, 1))
        x = base.x[:, -tokens:, block - 1].repeat_interleave(k, 0)
        z = base.z[:, -tokens:, block - 1].repeat_interleave(k, 0)
        if self.site == "mlp":
            assert source.mlp is not None
            return upper.from_z(block, x, z, source.mlp[:, -tokens:, block - 1].repeat_interleave(k, 0))
        rows = z.unflatten(0, (n, k))
        for j, unit in enumerate(chosen):
            which = self._heads_of(unit)
            rows[:, j, :, which] = source.z[:, -tokens:, block - 1][:, :, which]
        return upper.from_z(block, x, z)

    def _heads_of(self, unit: int) -> list[int]:
        if self.site == "head":
            return [unit]
        return list(self.heads.groups[unit]) if self.site == "group" else list(range(self.heads.n_heads))

    def _measured(self, logits: Tensor, bucket: _Bucket) -> dict[Measure, Tensor]:
        probes = [self.probes[i] for i in bucket.probes]
        target, other = (
            torch.tensor([getattr(probe, name) for probe in probes], device=logits.device)
            for name in ("target", "other")
        )
        return measures(logits, bucket.clean.logits, target, other)

    def _note(self, where: dict[Measure, Tensor], logits: Tensor, bucket: _Bucket, at: Tensor) -> None:
        for name, value in self._measured(logits, bucket).items():
            where[name][at] = value


# --- Several sites at once --------------------------------------------------------------------------------------------


def patch_set(
    heads: Heads,
    probes: Sequence[Probe],
    chosen: Tensor,
    mlps: Tensor | None = None,
    positions: Positions = "all",
    direction: Direction = "denoise",
    batch_size: int = 8,
) -> Patched:
    """Patch a set of heads, and of MLPs, all at once.

    Args:
        heads: of the model.
        probes: at least one.
        chosen: (block, head) bool.
        mlps: (block,) bool; None: none.
        positions, direction: see this module.
        batch_size: texts at once; changes nothing.

    Returns:
        with one block (0) and one unit.
    """
    if chosen.shape != (heads.n_blocks, heads.n_heads):
        raise UserError(f"a set of heads must be {(heads.n_blocks, heads.n_heads)}, got {tuple(chosen.shape)}")
    if not probes:
        raise UserError("patching needs at least one probe, got none")
    only = slice(None) if positions == "all" else slice(-1, None)
    parts = []
    for start in range(0, len(probes), batch_size):
        part = probes[start : start + batch_size]
        batches = [
            left_padded([getattr(probe, name) for probe in part], heads.model.pad_id).to(heads.model.device)
            for name in ("clean", "corrupted")
        ]
        clean, corrupted = (heads.run(batch, z=True, mlp=mlps is not None) for batch in batches)
        base, source = (batches[1], clean) if direction == "denoise" else (batches[0], corrupted)

        def change(block: int, z: Tensor, source_z: Tensor | None = source.z) -> Tensor:
            assert source_z is not None
            which = chosen[block - 1].to(z.device)
            z = z.clone()
            z[:, only] = torch.where(which[:, None], source_z[:, only, block - 1], z[:, only])
            return z

        def change_mlp(block: int, x: Tensor, source_mlp: Tensor | None = source.mlp) -> Tensor:
            assert source_mlp is not None and mlps is not None
            if not mlps[block - 1]:
                return x
            x = x.clone()
            x[:, only] = source_mlp[:, only, block - 1]
            return x

        patched = heads.run(base, change, None if mlps is None else change_mlp)
        target, other = (torch.tensor([getattr(p, n) for p in part], device=base.input_ids.device)
                         for n in ("target", "other"))  # fmt: skip
        runs = (patched.logits, clean.logits, corrupted.logits)
        parts.append([measures(logits, clean.logits, target, other) for logits in runs])
    names: tuple[Measure, ...] = get_args(Measure)
    joined = [{name: torch.cat([part[i][name] for part in parts]) for name in names} for i in range(3)]
    found = Patched("head", positions, direction, (0,), joined[0], joined[1], joined[2])
    return replace(found, values={name: value[None, None] for name, value in found.values.items()})
