"""Names of a package that are loaded when they are first asked for, so that importing the package costs nothing.

A package lists its names under TYPE_CHECKING (for tools that read) and tells `exports` where each is (for Python)::

    __getattr__, __dir__ = exports(__name__, {"CodiModel": "codi.model"})

Knows nothing about what the names are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["exports"]


def exports(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        where: name -> module that defines it.
    """
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(where[name]), name)
        setattr(module, name, value)  # found at once the next time
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *where})

    return get, names
