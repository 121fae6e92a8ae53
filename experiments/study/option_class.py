"""What a class of options is: values checked when it is made, what of them decides a result, the command as typed.

The groups of options that commands share are in options.py. Knows no option by name.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Options", "changed", "command_line", "identity_of"]


@dataclass(frozen=True)
class Options:
    """What every group of options can do: check its values, once, when it is made."""

    COMMAND: ClassVar[str] = ""
    """Words after `codi` that these options belong to, such as "necessity" or "lens train"."""
    AT_LEAST: ClassVar[Mapping[str, float]] = {}
    """Option -> smallest value that is allowed. A command may ask for more than the group does."""
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset()
    """Options of this class that say where or how fast, not what."""
    IDENTITY: ClassVar[frozenset[str]] = frozenset()
    """Options of inherited groups that decide the result of this command although they don't that of others."""
    LATER: ClassVar[frozenset[str]] = frozenset()
    """Options that this class (or group) got after runs of it had been written."""

    def __post_init__(self) -> None:
        bounds: dict[str, float] = {}
        for one in reversed(type(self).__mro__):
            bounds |= vars(one).get("AT_LEAST", {})
        for name, low in bounds.items():
            value = getattr(self, name, None)
            if value is not None and value < low:
                allowed = f"at least {low}" if low else "0 or more"
                raise ValueError(f"{_shown(name)} must be {allowed}, got {value}")

    def check_inputs(self) -> None:
        """Refuse what can be seen to be wrong by a look at the disk, before anything is imported or loaded.

        Raises:
            ValueError: one line: what was given and what is allowed.
        """


def identity_of(options: Options) -> dict[str, Any]:
    """The options that decide the result, as plain JSON values: the same keys as in the manifest of a run of the study.

    Left out: what `NOT_IDENTITY` names (unless the command's `IDENTITY` does), and what `LATER` names where it has the
    default of this command.
    """
    outside, inside, later = (
        frozenset().union(*(vars(one).get(name, ()) for one in type(options).__mro__))
        for name in ("NOT_IDENTITY", "IDENTITY", "LATER")
    )
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in outside - inside or (field.name in later and value == _default(field)):
            continue
        found[field.name] = str(value) if isinstance(value, Path) else list(value) if type(value) is tuple else value
    return found


def changed(options: Options) -> dict[str, Any]:
    """The options that are not at their default."""
    fields = dataclasses.fields(options)
    return {one.name: getattr(options, one.name) for one in fields if getattr(options, one.name) != _default(one)}


def command_line(options: Options) -> str:
    """The command that asks for these options, as it is typed."""
    words = ["codi", *options.COMMAND.split()]
    for name, value in changed(options).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{_shown(name)}")
        else:
            words += [f"--{_shown(name)}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _shown(name: str) -> str:
    return name.replace("_", "-")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
