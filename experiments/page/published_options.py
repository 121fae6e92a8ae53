"""Options of `codi published`, over those of `codi findings`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from codi.known import KNOWN
from experiments.page.options import FindingsOptions
from experiments.page.studies import PUBLISHED_STUDIES, Entry
from lm.terms import Dtype

__all__ = ["PublishedOptions"]


@dataclass(frozen=True)
class PublishedOptions(FindingsOptions):
    """Everything on the published checkpoints: accuracy, the seed study's grids, all studies, one page.

    Needs a connection to the Hugging Face hub, about 10 GB of disk and a GPU: on a processor it takes days. Downloads
    the checkpoints and data sets; GSM8K, SVAMP, MultiArith and GSM-Hard with the attention mask carried on and dropped
    as published, beside the published figures; the latent-pair sweep of cache and embedding as the seed study made it
    and corrected; every study of `codi findings`. The page compares the models and opens with their accuracies. The
    same command continues an interrupted run; --only gsm8k-carried gsm8k-published … runs a part.
    """

    COMMAND: ClassVar[str] = "published"
    ENTRIES: ClassVar[tuple[Entry, ...]] = PUBLISHED_STUDIES

    model: Annotated[str | tuple[str, ...], tyro.conf.arg(metavar="MODEL …")] = tuple(KNOWN)  # type: ignore[assignment]
    """Published checkpoints: hub ids, or folders of the same last name."""
    local: Path | None = None
    """Folder with copies of checkpoints, base models and data sets, each under the last part of its hub id; what lies
    there is not downloaded. None: everything comes from the hub or its cache."""
    dtype: Dtype = "bfloat16"
    out: Path = Path("runs/published")
    page: Path = Path("docs/published.md")

    def check_inputs(self) -> None:
        if self.local is not None and not self.local.expanduser().is_dir():
            raise ValueError(f"local must be a folder, got {self.local}")
        super().check_inputs()

    def place(self, name: str) -> str:
        """Where a checkpoint, base model or data set is: its copy, or else its hub id."""
        copy = None if self.local is None else self.local.expanduser() / Path(name).name
        return str(copy) if copy is not None and copy.is_dir() else name
