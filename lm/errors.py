"""The one kind of error that is a person's mistake: a clear line that the command line prints as it is. No imports."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """A caller's mistake, or a file that cannot be used: one clear line, which the command line prints as it is."""
