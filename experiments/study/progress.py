"""Progress bars on stderr for steps that take long, and their silent twin for whoever is not watching.

Knows nothing about what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Bar", "no_bar", "progress"]

Bar = Callable[[int, str, str], AbstractContextManager[Callable[[int], object]]]
"""(how many, of what, doing what) -> context that gives the function which moves the bar by a number."""


@contextmanager
def progress(total: int, unit: str, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr.

    Args:
        total: how many there will be.
        unit: what is counted, such as "prompt".
        what: what is done with them, such as "reading".

    Yields:
        The function that moves it by a number.
    """
    from tqdm import tqdm

    rarely = 0.1 if sys.stderr.isatty() else 15.0  # nobody watches a file
    with tqdm(
        total=total, unit=unit, desc=what, smoothing=0.1, leave=None, mininterval=rarely, file=sys.stderr
    ) as bar:  # leave None: bars inside another one go when they are done
        yield bar.update


@contextmanager
def no_bar(total: int, unit: str, what: str) -> Iterator[Callable[[int], object]]:
    """Nothing is shown."""
    yield lambda number: None
