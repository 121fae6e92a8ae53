"""Options of `codi tune` and `codi reasoner`. Free of torch and pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments.study.language import SMOLLM2, LanguageOptions
from experiments.study.options import RunOptions, StatisticsOptions
from lm.errors import UserError
from lm.terms import Device

__all__ = ["BEGIN", "END", "ReasonerOptions", "TuneOptions", "parts_of_card"]


@dataclass(frozen=True)
class TuneOptions(RunOptions):
    """Train a LoRA adapter that writes a chain when asked for steps and answers at once otherwise."""

    COMMAND: ClassVar[str] = "tune"
    AT_LEAST: ClassVar[Mapping[str, float]] = {
        "batch_size": 1, "steps": 1, "micro_batch": 1, "lora_r": 1, "demonstrations": 0, "save_every": 1,
        "eval_every": 0, "eval_samples": 1, "weight_decay": 0,
    }  # fmt: skip
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {"model", "adapter", "device", "save_every", "eval_every", "eval_samples"}
    )
    IDENTITY: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    out: Path = Path("runs/tune")
    model: str = SMOLLM2
    """Base model: a folder or a hub id. The default is made by `make smollm2`."""
    adapter: Path | None = None
    """Folder that the finished adapter is written to; None: OUT/adapter."""
    seed: int = 0
    """Seed of adapter weights and samples."""
    steps: int = 640
    """Optimiser steps."""
    batch_size: int = 16
    """Samples per optimiser step."""
    micro_batch: int = 8
    """Samples computed at once, of similar length: memory against speed."""
    lr: float = 1e-3
    """Highest learning rate; cosine to zero after 3 % warm-up."""
    weight_decay: float = 0.01
    """Weight decay."""
    clip: float = 1.0
    """Largest gradient norm."""
    lora_r: int = 8
    """LoRA rank, on every linear layer but the unembedding."""
    lora_alpha: int = 16
    """LoRA scale is alpha / r."""
    demonstrations: int = 2
    """Largest number of solved ontologies before a sample that has any."""
    demonstrated: float = 0.06
    """Share of the samples that are ontologies with 0 to --demonstrations solved ones before them."""
    device: Device = "auto"
    """Where to train; auto: CUDA if there is any."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: bfloat16 autocast, frozen weights held in bfloat16; float32 throughout."""
    save_every: int = 30
    """Steps between state files."""
    eval_every: int = 80
    """Steps between accuracies on held-out samples (0: never)."""
    eval_samples: int = 12
    """Held-out samples of each task and way of asking."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.demonstrated <= 1:
            raise UserError(f"demonstrated is a share between 0 and 1, got {self.demonstrated}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")

    def check_inputs(self) -> None:
        super().check_inputs()
        from lm.places import refuse_missing

        refuse_missing(self.model, Path(self.model).expanduser())

    @property
    def target(self) -> Path:
        """Folder of the finished adapter."""
        return self.out / "adapter" if self.adapter is None else self.adapter


BEGIN, END = "<!-- codi reasoner -->", "<!-- end of codi reasoner -->"
"""What stands around the numbers of a model card."""


def parts_of_card(path: Path) -> tuple[str, str]:
    """What stands before and after the numbers of a card.

    Raises:
        ValueError: it does not have the two marks, once each and in this order.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise UserError(f"{path} must have the marks {BEGIN} and {END} once each, in this order")
    return before, after


@dataclass(frozen=True)
class ReasonerOptions(StatisticsOptions, RunOptions, LanguageOptions):
    """Chains and accuracy of a language model that is asked for steps, for the answer at once, or for nothing."""

    COMMAND: ClassVar[str] = "reasoner"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"items": 2, "base_items": 0, "max_new_tokens": 1}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"card"})

    model: str = "checkpoints/smollm2-reasoner"
    out: Path = Path("runs/reasoner")
    batch_size: int = 64
    seed: int = 0
    items: int = 200
    """Held-out questions of each task."""
    base_items: int = 50
    """Of these, how many the base of an adapter is asked as well, in its own form of text; 0: none."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    card: Path | None = None
    """Model card (markdown) whose numbers, between its two marks, are replaced by those of this run."""

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.card is not None:
            if not self.card.is_file():
                raise UserError(f"--card {self.card}: no such file")
            parts_of_card(self.card)
