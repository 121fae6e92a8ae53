"""pyproject.toml, constraints.txt and environment.yml agree, and the commands of the README exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Brought along by the CUDA build of torch, which pins them itself; the CPU build has none of them.
ACCELERATOR = ("nvidia-", "cuda-", "triton")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        assert match, f"not an exact pin: {line!r}"
        assert canonical(match[1]) not in found, f"{match[1]} is pinned twice"
        found[canonical(match[1])] = match[2]
    return found


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def direct(project: dict) -> dict[str, str]:
    listed = project["project"]
    return pins(listed["dependencies"] + [pin for extra in listed["optional-dependencies"].values() for pin in extra])


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


def test_project_constraints_and_environment_agree(direct: dict[str, str], constraints: dict[str, str]) -> None:
    assert direct.items() <= constraints.items()
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(part["pip"] for part in dependencies if isinstance(part, dict))
    options = [line for line in pip if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    assert pins([line for line in pip if not line.startswith("-")]) == direct


def test_python_versions_agree(project: dict) -> None:
    lowest = project["project"]["requires-python"].removeprefix(">=")
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert any(isinstance(part, str) and part.startswith(f"python>={lowest},") for part in dependencies)
    assert f"version_info < ({lowest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_constraints_pin_everything_that_is_needed(direct: dict[str, str], constraints: dict[str, str]) -> None:
    """Walk the requirements of the installed packages: each one is pinned, and pinned to what is installed."""
    todo, seen = list(direct), set()
    while todo:
        name = todo.pop()
        if name in seen or name.startswith(ACCELERATOR):
            continue
        seen.add(name)
        assert name in constraints, f"{name} is needed but not in constraints.txt"
        assert metadata.version(name).split("+")[0] == constraints[name], name
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonical(requirement.name))
    assert len(seen) > 60


def test_version_is_the_same_everywhere(project: dict) -> None:
    source = (ROOT / "codi" / "__init__.py").read_text()
    assert re.search(r'__version__ = "(.*)"', source)[1] == project["project"]["version"]


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash")
    assert "make test" in script.read_text()


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)


@needs_make
@pytest.mark.parametrize("target", ["sweep", "test", "check", "fuzz", "bench"])
def test_make_target_sets_up_first(target: str, tmp_path: Path) -> None:
    plan = make("--dry-run", target, f"VENV={tmp_path / 'env'}")
    assert plan.returncode == 0, plan.stderr
    assert "-c constraints.txt -e '.[dev]'" in plan.stdout.splitlines()[-1] or "pip" in plan.stdout
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / ".installed").touch()  # the set-up is done once
    assert "pip" not in make("--dry-run", target, f"VENV={tmp_path / 'env'}").stdout


@needs_make
def test_old_python_is_refused_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.8.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    refused = make("setup", f"VENV={tmp_path / 'env'}", f"PYTHON={old}")
    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed" in refused.stderr and "3.8.1" in refused.stderr
    assert not (tmp_path / "env").exists()
    accepted = make("--dry-run", "setup", f"VENV={tmp_path / 'env'}", f"PYTHON={sys.executable}")
    assert accepted.returncode == 0


def test_what_git_keeps() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def ignored(path: str) -> bool:
        return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode == 0

    for path in (".venv/bin/python", "runs/sweep/manifest.json", "checkpoints/CODI-gpt2/model.safetensors"):
        assert ignored(path), path
    for path in ("checkpoints/README.md", "checkpoints/tiny/pytorch_model.bin", "checkpoints/tiny/base/config.json"):
        assert not ignored(path), path
