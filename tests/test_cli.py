"""The command line: what is listed, what is imported, and how mistakes are told."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path

import pytest

from experiments import cli
from experiments.commands import Command, command_of_module

ROOT = Path(__file__).resolve().parent.parent
STUDY = '''
    """A study for the tests."""
    import dataclasses
    import os
    import signal

    @dataclasses.dataclass(frozen=True)
    class Config:
        """What a study does."""

        run: str = "all is well"
        """What happens."""
        coefficients: tuple[float, ...] = (-1.0, 1.0)
        """Coefficients, in mean differences."""
        limit: int | None = None
        """Number of prompts."""

        def __post_init__(self):
            if self.limit == 0:
                raise ValueError("limit must be at least 1, got 0")

    class OurError(ValueError):
        pass

    def main(config):
        if config.run == "value":
            raise OurError("latent must be in 1..6,\\n  got 0")
        if config.run == "file":
            open("/no/such/file")
        if config.run == "full":
            raise OSError(28, "No space left on device", "runs/sweep")
        if config.run == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if config.run == "bug":
            raise KeyError("ours")
        print(config.run, config.coefficients)

    if __name__ == "__main__":
        from experiments.cli import run_module
        run_module(__name__)
'''
NESTED = '''
    """A study with commands of its own."""
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Train:
        """Train a lens."""
        steps: int = 3
        """Number of steps."""

    @dataclasses.dataclass(frozen=True)
    class Show:
        """Show a lens."""
        top: int = 5
        """Number of tokens."""

    CONFIG = Train | Show

    def main(config):
        print(config)
'''


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two study modules on the path, as `codi study` and `codi nested`, and a name without a module."""
    (tmp_path / "study_for_tests.py").write_text(textwrap.dedent(STUDY))
    (tmp_path / "nested_for_tests.py").write_text(textwrap.dedent(NESTED))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()

    def command(module: str, config: str, line: str) -> Command:
        return Command(f"{module}:{config}", f"{module}:main", line)

    monkeypatch.setitem(cli.COMMANDS, "study", command("study_for_tests", "Config", "a study for the tests"))
    monkeypatch.setitem(cli.COMMANDS, "nested", command("nested_for_tests", "CONFIG", "another"))
    monkeypatch.setitem(cli.COMMANDS, "later", command("module_that_is_not_there", "Config", "not yet"))
    return tmp_path


def codi(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process."""
    capsys.readouterr()
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_the_commands_whose_modules_are_there(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = codi(capsys, "--help")
    assert (code, err) == (0, "")
    listed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert "a study for the tests" in listed["study"] and "eval" in listed
    assert "later" not in listed
    assert codi(capsys, "-h")[1] == out


def test_no_command_and_unknown_command(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = codi(capsys)
    assert (code, out) == (2, "") and err.startswith("usage: codi")
    for name in ("nope", "later", "--nope"):
        code, out, err = codi(capsys, name)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1 and f"unknown command '{name}'" in err and "study" in err


def test_help_and_version_import_no_model_code() -> None:
    code = (
        "import sys\nfrom experiments.cli import main\nmain(['--help'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas', 'codi', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "7.8.9" if name == "codi-steering" else "?")
    assert codi(capsys, "--version") == (0, "codi 7.8.9\n", "")


def test_options_reach_the_study(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codi(capsys, "study")[:2] == (0, "all is well (-1.0, 1.0)\n")
    assert codi(capsys, "study", "--run", "x", "--coefficients", "-0.5", "2")[1] == "x (-0.5, 2.0)\n"
    code, out, _ = codi(capsys, "study", "--help")
    assert code == 0 and "Coefficients, in mean differences." in out and "usage: codi study" in out


@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--coefficients", "abc"), ("--coefficients", "cannot read 'abc'", "allowed", "FLOAT")),
        (("--limit", "abc"), ("--limit", "cannot read 'abc'", "allowed", "INT")),
        (("--limit", "0"), ("limit must be at least 1, got 0",)),
        (("--nope", "3"), ("Unrecognized options: --nope",)),
        (("--run", "value"), ("latent must be in 1..6, got 0",)),
        (("--run", "file"), ("No such file or directory: /no/such/file",)),
        (("--run", "full"), ("No space left on device: runs/sweep",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    says: tuple[str, ...],
    ascii: bool,
    studies: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", not ascii)
    code, out, err = codi(capsys, "study", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("codi study: error: ") and err.count("\n") == 1
    assert all(part in err for part in says), err
    assert not set("│╭╰─") & set(err)


def test_an_option_that_is_nearly_right_is_named(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = codi(capsys, "study", "--limt", "3")
    assert code == 2 and "Unrecognized options: --limt, 3 (did you mean --limit?)" in err and err.count("\n") == 1
    assert "did you mean" not in codi(capsys, "study", "--zzzz")[2]
    assert "did you mean --derivation" in codi(capsys, "necessity", "--derivaton", "3")[2]


def in_a_process(code: str, **environment: str) -> list[str]:
    """Lines that Python code prints in a process without the settings of OpenMP, but with these."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**kept, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_threads_that_wait_give_way_unless_the_user_says_otherwise() -> None:
    """Set before torch is imported, which reads it then."""
    code = (
        "import os, sys\nfrom experiments import cli\n"
        "cli.COMMANDS['x'] = cli.Command('experiments.study.options:Options', 'os:abort', '…')\n"
        "cli.Command.load_function = lambda command: lambda options: print('torch' in sys.modules)\n"
        "cli.main(['x'])\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    )
    assert in_a_process(code) == ["False", "1000"]
    assert in_a_process(code, GOMP_SPINCOUNT="7") == ["False", "7"]
    assert in_a_process(code, OMP_WAIT_POLICY="active") == ["False", "None"]


@pytest.mark.parametrize("early", ["", "import torch\n"])
def test_threads_are_those_that_were_asked_for(early: str) -> None:
    code = (
        f"{early}from experiments import cli\n"
        "cli.COMMANDS['x'] = cli.Command('experiments.study.options:RunOptions', 'os:abort', '…')\n"
        "def run(options):\n    import torch\n    print(options.threads, torch.get_num_threads())\n"
        "cli.Command.load_function = lambda command: run\ncli.main(['x', '--threads', '1'])"
    )
    assert in_a_process(code, OMP_NUM_THREADS="2") == ["1 1"]


def test_a_narrow_terminal_breaks_no_message(
    studies: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert (
        "--coefficients: cannot read 'a-very-long-word-that-does-not-fit'"
        in codi(capsys, "study", "--coefficients", "a-very-long-word-that-does-not-fit")[2]
    )
    assert os.environ["COLUMNS"] == "30"


def test_ctrl_c_is_130_and_a_bug_keeps_its_traceback(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = codi(capsys, "study", "--run", "interrupt")
    assert code == 130 and "interrupted" in err
    with pytest.raises(KeyError, match="ours"):
        cli.main(["study", "--run", "bug"])


def test_traceback_on_request(studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODI_DEBUG", "1")
    with pytest.raises(ValueError, match="latent must be"):
        cli.main(["study", "--run", "value"])


def test_nested_commands(studies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codi(capsys, "nested", "train", "--steps", "7")[:2] == (0, "Train(steps=7)\n")
    assert codi(capsys, "nested", "show")[:2] == (0, "Show(top=5)\n")
    for arguments in ((), ("nope",)):
        code, out, err = codi(capsys, "nested", *arguments)
        assert (code, out) == (2, "") and "train" in err and "show" in err and err.count("\n") == 1
    assert "cannot read 'x'" in codi(capsys, "nested", "show", "--top", "x")[2]


def test_a_study_runs_as_a_module_with_the_same_manners(studies: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(studies)])}

    def module(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "study_for_tests", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=studies)

    done = module("--run", "x", "--coefficients", "3")
    assert (done.returncode, done.stdout) == (0, "x (3.0,)\n"), done.stderr
    wrong = module("--coefficients", "abc")
    assert wrong.returncode == 2 and "cannot read 'abc'" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error(studies: Path) -> None:
    code = "from experiments.cli import run; import study_for_tests as s; run(s.main, s.Config, ['--run', 'x' * 10**6])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(studies)])}
    command = f'"{sys.executable}" -c "{code}" | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("x", "")


# --- Every subcommand that is there ---


def configurations(config: typing.Any) -> list[type]:
    """The dataclasses behind a configuration: itself, or the members of a union."""
    if isinstance(config, types.UnionType) or typing.get_origin(config) is typing.Union:
        return [one for member in typing.get_args(config) for one in configurations(member)]
    if typing.get_origin(config) is typing.Annotated:
        return configurations(typing.get_args(config)[0])
    return [config]


@pytest.mark.parametrize("name", sorted(cli.available()))
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for one in configurations(cli.COMMANDS[name].load_options()):
        assert dataclasses.is_dataclass(one) and one.__doc__ and not one.__doc__.startswith(f"{one.__name__}(")
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
        for here, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(here, ast.AnnAssign):
                option = ast.unparse(here.target)
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                explained |= ast.unparse(here.annotation).startswith("ClassVar")  # no option
                explained |= any(option in getattr(base, "__annotations__", {}) for base in one.__mro__[1:])
                grouped = dataclasses.is_dataclass(typing.get_type_hints(one)[option])
                assert explained or grouped, f"codi {name}: option {option} is not explained"
    code, out, err = codi(capsys, name, "--help")
    assert (code, err) == (0, "") and f"usage: codi {name}" in out


@pytest.mark.parametrize("name", sorted(cli.available()))
def test_every_study_is_also_a_module(name: str) -> None:
    """`python -m experiments.<name>` goes through the same function as `codi <name>`."""
    spec = importlib.util.find_spec(cli.COMMANDS[name].module)
    source = Path(spec.origin).read_text(encoding="utf-8")
    guard = ast.parse(source).body[-1]
    assert isinstance(guard, ast.If) and "__main__" in ast.unparse(guard.test)
    assert "run_module(__name__)" in ast.unparse(guard) or "run(main, " in ast.unparse(guard)


def test_a_room_runs_as_the_command_that_it_is() -> None:
    found = {module: command_of_module(f"experiments.{module}") for module in ("evaluate", "train", "sweep", "page")}
    assert found == {"evaluate": "eval", "train": "train", "sweep": "sweep", "page": "findings"}
    assert command_of_module("experiments.latents.necessity") == "necessity"
    assert command_of_module("experiments.latents") is None  # several commands, none of its name
