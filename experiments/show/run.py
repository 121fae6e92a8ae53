"""`codi show RUN`: the summary of a run folder, or the answers behind one cell of a sweep, flips first.

    codi show runs/necessity                                          what the study found
    codi show runs/sweep --pair 5-2 --latent 4 --coefficient 1        question, gold, unsteered and steered answer

Reads the folder alone; no model is loaded and nothing is written. Runs as `codi show` or `python -m experiments.show`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from experiments.show.cells import CHANGES, Cell, cells_of, listing, there
from experiments.show.options import ShowOptions
from experiments.study.manifest import command_of, read_manifest
from experiments.study.prompts_file import FILE, questions_of
from experiments.study.result import FILE as RESULT
from experiments.study.result import Result

__all__ = ["main", "shown"]

_WORDS = {"gained": "wrong → right", "lost": "right → wrong", "changed": "another answer, no flip", "same": "unchanged"}


def main(options: ShowOptions) -> None:
    """Print it."""
    print(shown(options))


def shown(options: ShowOptions) -> str:
    """What the command prints.

    Raises:
        ValueError: no result in the folder, or no such cell; what is there is listed.
    """
    run = options.run
    if not options.asks_for_a_cell:
        return _summary(options)
    assert options.latent is not None and options.coefficient is not None, "checked with the options"
    only: dict[str, str | None] = {"space": options.space, "part": options.part, "timing": options.timing}
    pair = options.latents_of_pair
    cells = cells_of(run, pair, options.latent, options.coefficient, options.draw, only)
    questions = questions_of(run)
    text = [_cell_text(cell, options, questions) for cell in cells]
    if not questions:
        text.append(f"{run} is of an early version and holds no questions: its own command, given again, adds {FILE}.")
    return "\n\n".join(text)


def _summary(options: ShowOptions) -> str:
    run = options.run
    if not (run / RESULT).exists():
        command = command_of(read_manifest(run)["identity"]) if (run / "manifest.json").exists() else "sweep"
        more = f"codi stats {run} makes it from the trials" if command == "sweep" else "run its command to the end"
        raise ValueError(f"{run}, a run of `codi {command}`, has no {RESULT} yet: {more}")
    result = Result.read(run)
    if result.study != "sweep":
        return result.markdown()
    path = run / "summary.md"
    text = path.read_text(encoding="utf-8").rstrip() if path.exists() else result.markdown()
    known = {name: listing(name, values) for name, values in there(run).items() if values}
    cells = "\n".join(f"  --{name:<12} {value}" for name, value in known.items())
    how = f"The answers behind a cell: codi show {run} --pair A-B --latent N --coefficient C. There are"
    return f"{text}\n\n{how}\n{cells}"


def _cell_text(cell: Cell, options: ShowOptions, questions: Mapping[str, str]) -> str:
    """One cell: its counts, then its answers, flips first."""
    a, b = options.latents_of_pair
    coefficient = f"{options.coefficient:+g}".replace("-", "−")
    name = f"A{a}−B{b}" if options.draw is None else f"random direction {options.draw} (norm of A{a}−B{b})"
    if options.draw is not None:
        coefficient = coefficient.lstrip("+−")
    answers = cell.answers
    n = len(answers)
    before, after = 100 * answers["was_right"].mean(), 100 * answers["is_right"].mean()
    head = (
        f"## {name} · c = {coefficient} · latent {options.latent} · {cell.space} ({cell.part}) · {cell.timing}\n\n"
        f"{n} prompts: unsteered {before:.1f} % right, steered {after:.1f} %. {cell.count('gained')} gained, "
        f"{cell.count('lost')} lost, {cell.count('changed')} with another answer but no flip, "
        f"{cell.count('same')} unchanged."
    )
    listed = answers if options.limit is None else answers.head(options.limit)
    blocks = [head]
    for change in CHANGES:
        rows = listed[listed["change"] == change]
        if rows.empty:
            continue
        blocks.append(f"{change} ({_WORDS[change]}): {cell.count(change)}")
        for row in rows.itertuples(index=False):
            question = questions.get(str(row.prompt_id), "")
            asked = textwrap.fill(
                f"{row.prompt_id}: {' '.join(question.split())}".rstrip(": "), 116,
                initial_indent="  ", subsequent_indent="    ",
            )  # fmt: skip
            told = f"gold {row.answer:.12g} · unsteered {_bare(row.unsteered)} · steered {_bare(row.steered)}"
            blocks.append(f"{asked}\n    {told}")
    if len(listed) < n:
        blocks.append(f"… and {n - len(listed)} more: --limit None lists all")
    return "\n\n".join(blocks)


def _bare(text: object) -> str:
    """An answer in one line."""
    return " ".join(str(text).split()) or "(nothing)"


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
