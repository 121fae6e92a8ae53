"""Which latent learns which step: the named assignments, pairs, and what is refused."""

from __future__ import annotations

import pytest

from codi.step_latents import SILENT, parse_step_latents


def test_assignments_by_hand() -> None:
    assert parse_step_latents("same", 3) == ((1, 1), (2, 2), (3, 3))
    assert parse_step_latents("later", 3) == ((2, 1), (3, 2), (4, 3))
    assert parse_step_latents("4:2, 2:1", 6) == ((2, 1), (4, 2))
    assert parse_step_latents("2:-,3:1,7:9", 6) == ((2, SILENT), (3, 1), (7, 9))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "same, later, or pairs latent:step"),
        ("sooner", "got 'sooner'"),
        ("1:0", "got '1:0'"),
        ("1-1", "got '1-1'"),
        ("0:1", r"must be in 1\.\.7 .*got 0"),
        ("8:1", r"must be in 1\.\.7 .*got 8"),
        ("2:1,2:2", "names a latent twice: '2:1,2:2'"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_step_latents(text, 6)
