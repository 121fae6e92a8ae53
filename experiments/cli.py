"""The `codi` command: how an entry point is found, its options read, and its mistakes told.

`codi <name> …` reads the options of a subcommand (commands.py) with tyro, checks them, and only then imports what runs
it: help and refusals wait for neither torch nor a model. `python -m experiments.<room>` and
`python -m experiments.<room>.<module>` do the same. A module that runs a subcommand therefore ends with

    if __name__ == "__main__":
        from experiments.cli import run_module

        run_module(__name__)

and a room that is one subcommand has a `__main__.py` with the same call. Every field of the options carries a
docstring: it is the help text. A mistake of the caller (ValueError, a file that cannot be read or written, an option
that cannot be parsed) is one line on stderr and exit code 2; Ctrl-C is exit code 130; set CODI_DEBUG=1 to see the
traceback.

Knows nothing about models or tensors: `codi --help` and `codi --version` import neither torch nor the studies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.commands import COMMANDS, Command, available, command_of_module

__all__ = ["COMMANDS", "UsageError", "available", "main", "run", "run_command", "run_module"]

DISTRIBUTION = "codi-steering"
SPINS = "1000"
"""Turns that a thread of GNU OpenMP waits for work before it sleeps."""

# What tyro and Python say about a value that cannot be read, down to the value.
_UNREADABLE = (
    r"Could not find valid parse for arguments: \[(.*)\]",
    r"no type matching .* could be instantiated from \[(.*?)\]\..*",
    r"invalid literal for int\(\) with base 10: (.*)",
    r"could not convert string to float: (.*)",
)


class UsageError(ValueError):
    """An option that cannot be read; the message is one line that says what was given and what is allowed."""


def version() -> str:
    """Version of the installed project."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("the project is not installed here: pip install -c constraints.txt -e .") from None


def usage() -> str:
    """The text of `codi --help`."""
    commands = available()
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {one.line}" for name, one in commands.items()]
    return "\n".join(
        [
            "usage: codi [-h] [--version] COMMAND [OPTIONS]",
            "",
            "Look into, steer and test machine reasoning: CODI latents, control vectors, written chains of thought.",
            "",
            "commands:",
            *lines,
            "",
            "codi COMMAND --help explains every option, with unit and default.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `codi` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _one_line_errors("codi"):
        if not given:
            print(usage(), file=sys.stderr)
            sys.exit(2)
        name, rest = given[0], given[1:]
        if name in ("-h", "--help"):
            print(usage())
            return
        if name == "--version":
            print(f"codi {version()}")
            return
        commands = available()
        if name not in commands:
            near = difflib.get_close_matches(name, commands, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise UsageError(f"unknown command {name!r}{meant}; allowed: {', '.join(commands)}")
    run_command(commands[name], rest, prog=f"codi {name}")


def run_command(command: Command, arguments: Sequence[str] | None = None, prog: str = "") -> None:
    """Read a subcommand's options, check them, then import what runs it and call it.

    Args:
        command: of `COMMANDS`.
        arguments: command line without the program's name; None: that of the process.
        prog: name shown in usage and error lines.
    """
    prog = prog or os.path.basename(sys.argv[0])
    share_the_machine()
    with _one_line_errors(prog):
        options = parse(command.load_options(), sys.argv[1:] if arguments is None else arguments, prog)
        use_threads(getattr(options, "threads", 0) or 0)
        if hasattr(options, "check_inputs"):
            options.check_inputs()
        command.load_function()(options)


def run_module(name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a study as `python -m experiments.<module>` does.

    Args:
        name: `__name__` of the calling module ("__main__"), or its importable name.
        arguments: command line; None: that of the process.
    """
    if name == "__main__":
        spec = sys.modules["__main__"].__spec__
        if spec is None:  # started by path
            file = Path(sys.modules["__main__"].__file__ or "").resolve()
            name = ".".join(file.relative_to(Path(__file__).resolve().parent.parent).with_suffix("").parts)
        else:
            name = spec.name
    name = name.removesuffix(".__main__")
    prog = f"python -m {name}"
    command = command_of_module(name)
    if command is not None:
        run_command(COMMANDS[command], arguments, prog)
        return
    # Imported under its own name, so that its classes are the same objects for everybody.
    function, config = _entry(importlib.import_module(name))
    run(function, config, arguments, prog=prog)


def run(function: Callable[[Any], object], config: Any, arguments: Sequence[str] | None = None, prog: str = "") -> None:
    """Read `config` from the command line and call `function` with it; a failure of the caller's making is one line.

    Args:
        function: the study's `main`.
        config: dataclass, or union of dataclasses (nested subcommands).
        arguments: command line without the program's name; None: that of the process.
        prog: name shown in usage and error lines.
    """
    prog = prog or os.path.basename(sys.argv[0])
    share_the_machine()
    with _one_line_errors(prog):
        function(parse(config, sys.argv[1:] if arguments is None else arguments, prog))


def share_the_machine() -> None:
    """Let threads that wait for work give way to other processes soon; to be called before torch is imported.

    They spin by default, so that two commands side by side take each other's cores and are 10 to 30 times slower. With
    a short spin each gets its half, and a lone command is as fast as before. What the user has set is kept.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def use_threads(number: int) -> None:
    """Compute with so many CPU threads.

    Args:
        number: 0 leaves it as it is.
    """
    if not number:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
        os.environ[name] = str(number)
    if "torch" in sys.modules:  # then it is too late for them
        sys.modules["torch"].set_num_threads(number)


def parse(config: Any, arguments: Sequence[str], prog: str) -> Any:
    """An instance of `config` read from the command line.

    Raises:
        UsageError: an option that is unknown, missing or cannot be read.
        SystemExit: with code 0 after --help.
    """
    import tyro

    def attempt(given: Sequence[str]) -> tuple[Any, str]:
        messages = io.StringIO()
        with contextlib.redirect_stderr(messages):
            try:
                return tyro.cli(config, prog=prog, args=list(given), config=(tyro.conf.OmitSubcommandPrefixes,)), ""
            except SystemExit as stop:
                if stop.code in (0, None):
                    raise
        return None, messages.getvalue()

    value, message = attempt(arguments)
    if not message:
        return value
    with _wide_terminal():  # once more, for a message that is not broken into lines
        _, message = attempt(arguments)
        if "Unrecognized options" in message and not arguments[0].startswith("-"):
            _, choices = attempt(())  # a nested subcommand that does not exist: say which ones do
            if "Missing subcommand" in choices and f"Unrecognized options: {arguments[0]}" in message:
                message = choices.replace("Expected", f"unknown command {arguments[0]!r}: expected")
    raise UsageError(_plain(message, prog))


def _entry(module: ModuleType) -> tuple[Callable[[Any], object], Any]:
    """`main` and the configuration of a study module: CONFIG, Config, or its only dataclass named …Config."""
    config = getattr(module, "CONFIG", None) or getattr(module, "Config", None)
    if config is None:
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        classes = [value for value in own if isinstance(value, type) and dataclasses.is_dataclass(value)]
        named = [value for value in classes if value.__name__.endswith("Config")]
        config = named[0] if len(named) == 1 else None
    assert config is not None and hasattr(module, "main"), f"{module.__name__} must offer main(config) and Config"
    return module.main, config


def _plain(message: str, prog: str) -> str:
    """What tyro says in a box, as one line: the complaint, and the form of the option it is about."""
    lines = [line.strip("│ ") for line in message.splitlines() if line.strip()]
    sections: list[list[str]] = [[]]
    for line in lines[1:]:  # the first is the title
        if line.startswith(("╭", "╰")):
            continue
        if re.fullmatch(r"─{3,}|-{3,}", line):  # lines are ASCII where the terminal is
            sections.append([])
        elif line:
            sections[-1].append(line)
    sections = [section for section in sections if section] or [["the options cannot be read"]]
    complaint = re.sub(r"^Error parsing (\w+: (?=[a-z]))?", "", " ".join(sections[0])).rstrip(". ")
    for reason in _UNREADABLE:
        complaint = re.sub(reason, r"cannot read \1", complaint)
    for section in sections[1:]:
        if section[0].startswith("Argument helptext") and len(section) > 1:
            complaint += f"; allowed: {re.split(r'  +', section[1])[0]}"
        near = [found[0] for line in section[1:] if (found := re.match(r"--[\w-]+", line))]
        if section[0].startswith("Perhaps you meant") and near:
            complaint += f" (did you mean {' or '.join(dict.fromkeys(near))}?)"
    return f"{complaint}; see {prog} --help"


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


@contextlib.contextmanager
def _one_line_errors(prog: str) -> Iterator[None]:
    """Turn a caller's mistake into one line on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (head, less) has gone: not a failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("CODI_DEBUG"):
            raise
        print(f"{prog}: error: {_describe(error)}", file=sys.stderr)
        sys.exit(2)


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{error.strerror}: {names}" if names else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
