"""adapter_config.json beside the weights: what peft was told about LoRA. What can be honoured is, the rest is refused.

Honoured: r and lora_alpha, use_rslora, rank_pattern and alpha_pattern (as peft matches them), target_modules,
exclude_modules, layers_to_transform with layers_pattern. Without effect on a finished model: dropout, initialisation
and the like. Whatever else is switched on is refused by its name.

Knows nothing about weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codi.protocol import UserError
from lm.weights import listed, read_object

__all__ = ["ADAPTER_CONFIG", "Adapter", "read_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
NO_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "init_lora_weights", "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
"""Settings that say how LoRA was trained or initialised: the stored weights already show what came of it."""
HONOURED = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "peft_type", "bias"),
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter_config.json says.

    Attributes:
        path: of the file, for messages.
        r, alpha: of modules that no pattern names; None where the file does not say.
        root: rank-stabilised: the scale is alpha / sqrt(r) instead of alpha / r.
        ranks, alphas: pattern -> number, as `rank_pattern` and `alpha_pattern`.
        targets, excluded: names (endings), or one regular expression; None: not said.
        layers: numbers of the blocks that carry LoRA, from 0; None: all.
        lists: names of the lists of blocks that `layers` counts in; empty: any.
    """

    path: Path
    r: int | None
    alpha: float | None
    root: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None
    lists: tuple[str, ...]

    @property
    def chooses(self) -> bool:
        """Whether it says which modules carry LoRA."""
        return self.targets is not None

    def carries(self, module: str, is_head: bool = False) -> bool:
        """Whether a linear layer of the base model carries LoRA.

        Args:
            module: its name in the base model.
            is_head: it is the output layer, which "all-linear" leaves out.
        """
        if _names(self.excluded, module):
            return False
        if self.targets == "all-linear":
            return not is_head
        if not _names(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\." for name in self.lists] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers

    def rank(self, module: str) -> int | None:
        """Rank of a module; None: the file does not say."""
        return _by_pattern(self.ranks, module, self.r)

    def alpha_of(self, module: str, otherwise: float) -> float:
        """lora_alpha of a module.

        Args:
            module: its name in the base model.
            otherwise: where the file does not say.
        """
        found = _by_pattern(self.alphas, module, self.alpha)
        return otherwise if found is None else found

    def scale(self, alpha: float, r: int) -> float:
        """What B A is multiplied by."""
        return alpha / math.sqrt(r) if self.root else alpha / r


def _names(names: tuple[str, ...] | str | None, module: str) -> bool:
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    return next((v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter_config.json of a folder, None if there is none.

    Raises:
        ValueError: a file that cannot be read, a value that makes no sense, or a setting that is not supported.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_object(path)
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA, got {config['peft_type']!r}"[:500])
    if config.get("bias", "none") not in ("none", None):
        raise UserError(f"{path}: bias={config['bias']!r} is not supported, only 'none'"[:500])
    switched_on = sorted(name for name, value in config.items() if name not in NO_EFFECT | HONOURED and value)
    if switched_on:
        raise UserError(f"{path}: {listed(switched_on)} is not supported: merge the adapter, or leave it out"[:500])
    read = _Reader(path, config)
    return Adapter(
        path,
        read.number("r", 1, whole=True),
        read.number("lora_alpha", 0),
        read.flag("use_rslora"),
        read.table("rank_pattern", 1, whole=True),
        read.table("alpha_pattern", 0),
        read.names("target_modules"),
        read.names("exclude_modules"),
        read.layers("layers_to_transform"),
        _as_tuple(read.names("layers_pattern")),
    )


def _as_tuple(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


@dataclass(frozen=True)
class _Reader:
    """Values of a JSON object, of the type that is wanted."""

    path: Path
    config: Mapping[str, Any]

    def wrong(self, name: str, wanted: str, value: Any) -> UserError:
        return UserError(f"{self.path}: {name} must be {wanted}, got {value!r}"[:500])

    def checked(self, name: str, value: Any, low: float, whole: bool) -> Any:
        kinds = (int,) if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value < 1e9:
            raise self.wrong(name, f"a {'whole ' if whole else ''}number, {low:g} or more", value)
        return value

    def number(self, name: str, low: float, whole: bool = False) -> Any:
        value = self.config.get(name)
        return None if value is None else self.checked(name, value, low, whole)

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value not in (None, True, False):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def pattern(self, name: str, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise self.wrong(name, f"a regular expression ({error})", value) from error
        return value

    def table(self, name: str, low: float, whole: bool = False) -> dict[str, Any]:
        value = self.config.get(name) or {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object of patterns with numbers", value)
        return {self.pattern(name, key): self.checked(f"{name} {key!r}", x, low, whole) for key, x in value.items()}

    def names(self, name: str) -> tuple[str, ...] | str | None:
        value = self.config.get(name)
        if value is None or value == []:
            return None
        if isinstance(value, str):
            return self.pattern(name, value)
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(name, "a list of names or one regular expression", value)
        return tuple(value)

    def layers(self, name: str) -> tuple[int, ...] | None:
        value = self.config.get(name)
        if value is None or value == []:
            return None
        rows = value if isinstance(value, list) else [value]
        return tuple(self.checked(name, x, 0, True) for x in rows)
