"""Options of studies on ordinary language models: which model, how a request becomes its text, which items are asked.

The counterpart of `ModelOptions` (options.py) for models that have no latents. Imports neither torch nor pandas until
`load` is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from experiments.study.options import JudgingOptions, Options
from experiments.tasks import Reading
from lm.terms import Attention, Device, Dtype

if TYPE_CHECKING:
    from experiments.tasks.items import ItemSplits
    from lm.model import LanguageModel

__all__ = ["ItemOptions", "LanguageOptions", "load_language_model"]

SMOLLM2 = "checkpoints/smollm2"


@dataclass(frozen=True)
class LanguageOptions(Options):
    """Which language model, and how it runs. A run's identity has the hash of the weights and the device."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"model", "device"})

    model: str = SMOLLM2
    """Language model: a folder, a hub id such as EleutherAI/pythia-410m, a .gguf file, or the folder of a LoRA adapter.
    The default is made by `make smollm2`."""
    base: str | None = None
    """Base model of an adapter; None: the one that the adapter names."""
    gguf: str | None = None
    """Name of a GGUF file inside the folder or hub repository."""
    form: Literal["auto", "plain", "chat", "response"] = "auto"
    """How a request becomes a text: as it is, in the chat template, or under ### Input and ### Response; auto:
    what the adapter was trained on, else the chat template where there is one."""
    device: Device = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Dtype = "float32"
    """Number format of the model's weights."""
    blocks: str | None = None
    """Name of the list of blocks in the model, such as model.layers; None: found by structure."""
    norm: str | None = None
    """Name of the final norm in the model, such as model.norm; None: found by structure."""

    def load_arguments(self, attention: Attention = "sdpa") -> dict[str, Any]:
        """Arguments of `lm.load.load_lm`, plain values: a model can be loaded from them in another process."""
        return {
            "name": self.model,
            "base": self.base,
            "gguf": self.gguf,
            "form": None if self.form == "auto" else self.form,
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "attention": attention,
            "blocks": self.blocks,
            "norm": self.norm,
        }

    def recipe(self, attention: Attention = "sdpa") -> tuple[Callable[..., LanguageModel], dict[str, Any]]:
        """Function of a module and its arguments that load the model in any process."""
        return load_language_model, self.load_arguments(attention)

    def load(self, attention: Attention = "sdpa") -> LanguageModel:
        """The model, checked."""
        return load_language_model(**self.load_arguments(attention))

    def check_inputs(self) -> None:
        super().check_inputs()
        from lm.places import refuse_missing

        refuse_missing(self.model, Path(self.model).expanduser())


@dataclass(frozen=True)
class ItemOptions(Options):
    """Which items are asked, how many, and what stands around them."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"derivation": 2, "validation": 1, "limit": 1, "examples": 0}

    task: str = "indirect-objects-A"
    """Task: indirect-objects-A, -B, -AL, -BL, -H, -HL, babi-15, babi-16, ontology-1 to -3, arithmetic, gsm8k,
    multiarith, svamp, a file with question and answer (choices if you like), a folder, a hub id, or mmlu:PLACE,
    arc:PLACE, agieval:PLACE, bigbench:PLACE."""
    limit: int = 60
    """Most items that results are reported on (test)."""
    validation: int = 40
    """Most items that anything is chosen on; they share nothing with the others."""
    derivation: int = 100
    """Most items that vectors are taken from; they share nothing with the others."""
    examples: int = 0
    """Solved examples before every question (published: 0 or 1); beside the derivation items."""
    instruction: str = ""
    """Text behind every question, such as 'Answer with one word.'; not used where the model goes on with a text."""

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.tasks.item_sources import check_item_task

        check_item_task(self.task)

    def load_items(self, seed: int, tokenizer: Any, task: str | None = None) -> ItemSplits:
        """The items in three parts; the examples are the first ones of the derivation items.

        Args:
            seed: of generator, division and choice.
            tokenizer: of the model.
            task: None: the option.

        Raises:
            ValueError: no such task, or too few items.
        """
        from experiments.tasks.item_sources import Sizes, load_items

        sizes = Sizes(self.derivation + self.examples, self.validation, self.limit)
        found = load_items(task or self.task, sizes, seed, tokenizer)
        if len(found.derivation) < self.examples + 2:
            raise ValueError(
                f"{task or self.task}: {len(found.derivation)} derivation items are too few for vectors and "
                f"{self.examples} examples: at least {self.examples + 2} are needed"
            )
        return found.read_by(Reading(self.answers)) if isinstance(self, JudgingOptions) else found


def load_language_model(**arguments: Any) -> LanguageModel:
    """The model that `LanguageOptions.load_arguments` describes."""
    from transformers.utils.logging import disable_progress_bar

    from lm.load import load_lm

    disable_progress_bar()  # of reading files; studies have their own
    print(f"loading {arguments['name']}", file=sys.stderr, flush=True)
    return load_lm(**arguments)
