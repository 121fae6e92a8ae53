"""Imports point one way, each foreign interface is touched in one place, and every file says what it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lm", "codi", "steering", "lenses", "experiments")
ALLOWED = {
    "lm": {"lm"},
    "codi": {"codi", "lm"},
    "steering": {"steering", "codi", "lm"},
    "lenses": {"lenses", "codi", "lm"},
    "experiments": {"experiments", "steering", "lenses", "codi", "lm"},
}
# transformers' cache and attention interfaces, by module and by name
CACHE_MODULES = ("transformers.cache_utils", "transformers.masking_utils", "transformers.integrations")
CACHE_NAMES = {
    "AttentionInterface", "AttentionMaskInterface", "ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS",
    "Cache", "DynamicCache", "DynamicLayer", "StaticCache", "CacheLayerMixin", "EncoderDecoderCache",
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERY_FILE = FILES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))


def imports(source: str) -> list[tuple[str, str]]:
    """(module, name) of every import at run time, at any depth of the file; name is "" for `import module`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = [ast.Pass()]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def touches(module: str, name: str, package: str) -> bool:
    return module == package or module.startswith(package + ".") or (module == "" and name == package)


def violations(relative: str, source: str) -> list[str]:
    """What a file imports that is not its business."""
    package = relative.split("/")[0]
    wrong = []
    for module, name in imports(source):
        top = module.split(".")[0]
        if top in PACKAGES and top not in ALLOWED[package]:
            wrong.append(f"{package} imports {module}")
        if top in ("tests", "benchmarks"):
            wrong.append(f"imports {module}")
        if touches(module, name, "peft") and relative != "codi/checkpoint.py":
            wrong.append("peft belongs to codi/checkpoint.py")
        if touches(module, name, "tuned_lens") and package != "lenses":
            wrong.append("tuned_lens belongs to lenses")
        cache = module.startswith(CACHE_MODULES) or (top == "transformers" and name in CACHE_NAMES)
        if cache and relative != "codi/cache.py":
            wrong.append(f"{module}.{name}: transformers' cache and attention interfaces belong to codi/cache.py")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_imports_only_what_it_may(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("codi/x.py", "from steering import means"),
        ("codi/x.py", "def f():\n    import experiments.sweep.cells"),
        ("steering/x.py", "from lenses.latent_lens import a"),
        ("lenses/x.py", "import steering"),
        ("codi/training.py", "from peft import LoraConfig"),
        ("experiments/x.py", "import tuned_lens.nn"),
        ("codi/rollout.py", "from transformers import DynamicCache"),
        ("steering/x.py", "from transformers.cache_utils import Cache"),
        ("experiments/x.py", "import tests.conftest"),
    ],
)
def test_the_rule_bites(relative: str, line: str) -> None:
    assert violations(relative, line)


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("codi/checkpoint.py", "from peft import LoraConfig"),
        ("codi/cache.py", "from transformers import DynamicCache"),
        ("lenses/x.py", "from tuned_lens.nn import TunedLens"),
        ("experiments/x.py", "from steering import means\nfrom lenses import x\nfrom codi import load_codi"),
        ("steering/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from experiments import stats"),
    ],
)
def test_the_rule_lets_pass_what_it_should(relative: str, line: str) -> None:
    assert violations(relative, line) == []


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and len(docstring.split()) >= 4


def test_no_file_is_named_after_nothing() -> None:
    names = {path.stem for path in EVERY_FILE}
    assert not names & {"utils", "util", "common", "helpers", "base", "misc"}
