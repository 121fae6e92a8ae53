"""Imports point one way and never in circles, each foreign interface is touched in one place, no file or function grows
beyond what can be read at once, and every file says what it is."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lm", "codi", "steering", "lenses", "circuits", "experiments")
ALLOWED = {
    "lm": {"lm"},
    "codi": {"codi", "lm"},
    "steering": {"steering", "codi", "lm"},
    "lenses": {"lenses", "codi", "lm"},
    "circuits": {"circuits", "lm"},
    "experiments": {"experiments", "steering", "lenses", "circuits", "codi", "lm"},
}
# transformers' cache and attention interfaces, by module and by name
CACHE_MODULES = ("transformers.cache_utils", "transformers.masking_utils", "transformers.integrations")
CACHE_NAMES = {
    "AttentionInterface", "AttentionMaskInterface", "ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS",
    "Cache", "DynamicCache", "DynamicLayer", "StaticCache", "CacheLayerMixin", "EncoderDecoderCache",
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
GROUND = ("tasks", "statistics", "figures")
"""Parts of experiments that import none of the others."""
DOOR = ("cli", "commands")
"""Modules of experiments that find commands by their names and import no room."""
LONGEST_MODULE, LONGEST_FUNCTION = 500, 80
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


def part_of(module: str) -> str:
    """Part of experiments that a module belongs to: a room, one of GROUND, "study", "cli" …; "" for experiments."""
    return ".".join(module.split(".")[1:2])


def allowed_parts(part: str) -> set[str]:
    """Parts of experiments that a part may import: tasks, statistics, figures <- study <- rooms <- page, cli."""
    if part in GROUND or part == "":
        return {part}
    if part == "study":
        return {part, *GROUND}
    if part in DOOR:
        return set(DOOR)
    return {part, "study", *GROUND, "cli", *(DOOR if part == "page" else ())}


def wrong_rooms(relative: str, source: str) -> list[str]:
    """What a file of experiments imports of other parts of experiments that it may not."""
    part = part_of(module_name(relative))
    wrong = []
    for module, name in imports(source):
        if module.split(".")[0] != "experiments":
            continue
        whole = f"{module}.{name}" if module == "experiments" and name else module
        if part_of(whole) not in allowed_parts(part):
            wrong.append(f"experiments.{part} imports {whole}")
        elif part_of(whole) == "cli" and part not in (*DOOR, "page") and name not in ("run_module", "run"):
            wrong.append(f"experiments.{part} imports more of the cli than how it is run: {whole}.{name}")
    return wrong


def violations(relative: str, source: str) -> list[str]:
    """What a file imports that is not its business."""
    package = relative.split("/")[0]
    wrong = wrong_rooms(relative, source) if package == "experiments" else []
    for module, name in imports(source):
        top = module.split(".")[0]
        if top in PACKAGES and top not in ALLOWED[package]:
            wrong.append(f"{package} imports {module}")
        if top in ("tests", "benchmarks"):
            wrong.append(f"imports {module}")
        if touches(module, name, "peft") and relative not in ("codi/lora.py", "lm/adapters.py"):
            wrong.append("peft belongs to codi/lora.py and lm/adapters.py")
        if touches(module, name, "tuned_lens") and package != "lenses":
            wrong.append("tuned_lens belongs to lenses")
        cache = module.startswith(CACHE_MODULES) or (top == "transformers" and name in CACHE_NAMES)
        if cache and relative != "lm/cache.py":
            wrong.append(f"{module}.{name}: transformers' cache and attention interfaces belong to lm/cache.py")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_imports_only_what_it_may(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    assert violations(relative, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("codi/x.py", "from steering import means"),
        ("lm/x.py", "from codi.protocol import UserError"),
        ("codi/cache.py", "from transformers import DynamicCache"),
        ("codi/checkpoint.py", "from peft import LoraConfig"),
        ("codi/x.py", "def f():\n    import experiments.sweep.run"),
        ("steering/x.py", "from lenses.latent_lens import a"),
        ("lenses/x.py", "import steering"),
        ("circuits/x.py", "from codi import load_codi"),
        ("circuits/x.py", "from experiments.statistics.exact import interval"),
        ("steering/x.py", "from circuits.heads import Heads"),
        ("codi/training.py", "from peft import LoraConfig"),
        ("experiments/x.py", "import tuned_lens.nn"),
        ("codi/rollout.py", "from transformers import DynamicCache"),
        ("steering/x.py", "from transformers.cache_utils import Cache"),
        ("experiments/x.py", "import tests.conftest"),
        ("experiments/sweep/x.py", "from experiments.latents.pca import run"),
        ("experiments/latents/pca/x.py", "def f():\n    from experiments.sweep.grid import make_grid"),
        ("experiments/evaluate/x.py", "import experiments.train.run"),
        ("experiments/latents/x.py", "from experiments.page import markdown"),
        ("experiments/page/x.py", "from experiments.sweep import run"),
        ("experiments/page/x.py", "from experiments import lens"),
        ("experiments/study/x.py", "from experiments.latents.claims import MARGIN"),
        ("experiments/study/x.py", "from experiments.cli import run_module"),
        ("experiments/statistics/x.py", "from experiments.study.claims import Claim"),
        ("experiments/statistics/x.py", "from experiments.tasks import Problem"),
        ("experiments/figures/x.py", "from experiments.statistics.words import interval"),
        ("experiments/tasks/x.py", "from experiments.figures.style import save"),
        ("experiments/cli.py", "from experiments.study.options import Options"),
        ("experiments/commands.py", "from experiments.sweep.options import SweepOptions"),
        ("experiments/sweep/x.py", "from experiments.commands import COMMANDS"),
        ("experiments/sweep/x.py", "from experiments.cli import parse"),
    ],
)
def test_the_rule_bites(relative: str, line: str) -> None:
    assert violations(relative, line)


@pytest.mark.parametrize(
    ("relative", "line"),
    [
        ("codi/lora.py", "from peft import LoraConfig"),
        ("lm/cache.py", "from transformers import DynamicCache"),
        ("lenses/x.py", "from tuned_lens.nn import TunedLens"),
        ("experiments/x.py", "from steering import means\nfrom lenses import x\nfrom codi import load_codi"),
        ("experiments/sweep/x.py", "from experiments.study.run import Study\nfrom experiments.sweep.grid import Grid"),
        ("experiments/latents/pca/x.py", "from experiments.latents.claims import MARGIN"),
        (
            "experiments/latents/x.py",
            "from experiments.figures.style import save\nfrom experiments.tasks import Problem",
        ),
        ("experiments/latents/x.py", "from experiments.cli import run_module"),
        ("experiments/page/x.py", "from experiments.cli import parse\nfrom experiments.commands import study_of"),
        ("experiments/cli.py", "from experiments.commands import COMMANDS"),
        ("steering/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from experiments import stats"),
    ],
)
def test_the_rule_lets_pass_what_it_should(relative: str, line: str) -> None:
    assert violations(relative, line) == []


# --- Circles ----------------------------------------------------------------------------------------------------------


def module_name(relative: str) -> str:
    """Dotted name of a file: codi/rollout.py is codi.rollout, codi/__init__.py is codi."""
    return relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """module -> modules of ours that it imports, at any depth of the file, TYPE_CHECKING apart.

    `from package import name` points to the module package.name if there is one, and to the package if there is not.
    """
    found: dict[str, set[str]] = {}
    for name, source in sources.items():
        found[name] = set()
        for module, item in imports(source):
            target = f"{module}.{item}" if f"{module}.{item}" in sources else module
            while target and target not in sources:  # import codi.rollout.something
                target = target.rpartition(".")[0]
            if target and target != name:
                found[name].add(target)
    return found


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of modules that reach each other by imports (strongly connected components of two or more)."""
    to = arrows(sources)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in to[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reach = {name: reached(name) for name in sources}
    groups = {tuple(sorted(m for m in reach[name] if name in reach[m])) for name in sources if name in reach[name]}
    return sorted(map(list, groups))


def test_no_circles() -> None:
    sources = {module_name(p.relative_to(ROOT).as_posix()): p.read_text(encoding="utf-8") for p in FILES}
    assert circles(sources) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"codi.a": "from codi import b", "codi.b": "from codi.a import x"},
        {"codi.a": "import codi.b", "codi.b": "def f():\n    from codi.c import x", "codi.c": "from codi import a"},
        {"codi.a": "import codi.b", "codi.b": "if True:\n    import codi.a.x"},
        {"codi": "from codi.a import x", "codi.a": "from codi import x"},
    ],
)
def test_the_rule_against_circles_bites(sources: dict[str, str]) -> None:
    assert circles(sources) == [sorted(sources)]


def test_the_rule_against_circles_lets_pass_what_it_should() -> None:
    hint = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from codi.b import x"
    assert circles({"codi.a": hint, "codi.b": "import codi.a", "codi.c": "from codi import a, b"}) == []


# --- Sizes ------------------------------------------------------------------------------------------------------------


def too_long(source: str) -> list[str]:
    """What of a file is longer than it may be."""
    found = []
    if (lines := len(source.splitlines())) > LONGEST_MODULE:
        found.append(f"{lines} lines, at most {LONGEST_MODULE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                found.append(f"{node.name} has {lines} lines, at most {LONGEST_FUNCTION}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_too_long(path: Path) -> None:
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_the_rule_about_length_bites() -> None:
    function = "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION
    assert too_long(function) == [f"f has {LONGEST_FUNCTION + 1} lines, at most {LONGEST_FUNCTION}"]
    assert too_long("def f():\n" + "    x = 1\n" * (LONGEST_FUNCTION - 1)) == []
    assert too_long("x = 1\n" * LONGEST_MODULE) == []
    assert len(too_long("x = 1\n" * (LONGEST_MODULE + 1))) == 1


# --- What files say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and len(docstring.split()) >= 4


def test_no_file_is_named_after_nothing() -> None:
    names = {path.stem for path in EVERY_FILE}
    assert not names & {"utils", "util", "common", "helpers", "base", "misc"}
