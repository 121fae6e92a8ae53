"""`codi findings`: every study on one model, one after another, and one page with what they found.

    codi findings                                   # the model in the box -> runs/findings, docs/findings.md
    codi findings --model bcywinski/codi_llama1b-answer_only --out runs/llama --page runs/llama/findings.md

Each study runs as its own command with its defaults, in a folder of its own under `out`; the page holds what each of
them printed under the command that printed it, its figures, and on top the published claims of all studies in one
table. What stands on the page above the marker line is somebody's own words and is kept. A study that cannot be made on
a model (the reason is its one line of error) is named on the page with that reason; the others go on. The same command
continues an interrupted run.

Knows nothing about what a study does: only how it is called and where it leaves its tables and figures.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.study.claims import Claim

__all__ = ["MARKER", "STUDIES", "Config", "Study", "demoted", "main"]

MARKER = "<!-- What follows is written by `codi findings`; what stands above this line is kept. -->"


@dataclass(frozen=True)
class Study:
    """One study as it is called, and what of it is shown.

    Attributes:
        name: folder of its results under `Config.out`, and its name for `Config.only`.
        command: the words after `codi`.
        question: one line for the page.
        figures: figures that are shown, without .png, in this order.
        reads: option that names a folder which another study wrote, and that study.
    """

    name: str
    command: tuple[str, ...]
    question: str
    figures: tuple[str, ...] = ()
    reads: tuple[str, str] | None = None


LENS = ("--lens", "lens")
STUDIES: tuple[Study, ...] = (
    Study("lens", ("lens", "train"), "Tuned lenses for every latent × layer: held-out KL.", ("held_out",)),
    Study("lens-show", ("lens", "show"), "What the lenses read in one prompt.", ("heatmap",), LENS),
    Study("lens-detect", ("lens", "detect"), "Are intermediate values and answers readable?", ("detection",), LENS),
    Study("lens-transfer", ("lens", "transfer"), "Lenses of latents on text tokens, and back.", ("transfer",), LENS),
    Study("lens-difference", ("lens", "difference"), "The lens on differences of latents.", (), LENS),
    Study("lens-causal", ("lens", "causal"), "Does the model use what the lens reads?", ("causal",), LENS),
    Study("alternation", ("alternation",), "Do even latents store and odd latents compute?", ("alternation",)),
    Study("probes", ("probes",), "What a linear map reads.", ("probes",)),
    Study("necessity", ("necessity",), "Which latents the answer needs.", ("necessity",)),
    Study("patch", ("patch",), "Which latents move the answer, and where to.", ("means", "values", "interchange")),
    Study("transfer", ("transfer",), "Do latents carry the prompt?", ("transfer",)),
    Study("anchors", ("anchors",), "Which latent the answer hangs on, who reads whom.", ("importance", "dependencies")),
    Study("early-exit", ("early-exit",), "Answering after each latent.", ("early-exit",)),
    Study("pca", ("pca",), "Components, and where each edit's effect goes.", ("components", "where")),
)


@dataclass(frozen=True)
class Config:
    """Run every study on one model and collect what they found on one page."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    out: Path = Path("runs/findings")
    """Folder; each study writes its own folder in it."""
    page: Path = Path("docs/findings.md")
    """The page (Markdown); its figures go to a folder of the same name beside it."""
    only: tuple[str, ...] = ()
    """Run these studies only; of the others the page shows what `out` holds of earlier runs. Empty: all."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published ratio."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    seed: int = 0
    """Seed of prompts, draws and statistics."""

    def __post_init__(self) -> None:
        names = [study.name for study in STUDIES]
        for name in self.only:
            if name not in names:
                raise ValueError(f"only names no study: {name!r}; allowed: {', '.join(names)}")


def options(config: Config, study: Study) -> list[str]:
    """The options of one study, those that are not its defaults."""
    given: list[str] = []
    for name in ("model", "base", "protocol", "lora_alpha", "mask", "device", "dtype", "seed"):
        value = getattr(config, name)
        if value != getattr(Config, name):
            given += [f"--{name.replace('_', '-')}", str(value)]
    if study.reads:
        given += [study.reads[0], str(config.out / study.reads[1])]
    return given


def run(study: Study, config: Config) -> None:
    """Run one study in a process of its own and keep what it printed as printed.md (or refused.txt) in its folder.

    Raises:
        ValueError: it was refused in a folder where it ran before, such as one of another model; what is there stays.
        RuntimeError: it broke off for a reason that is not the caller's.
        KeyboardInterrupt: it was interrupted.
    """
    from experiments.commands import COMMANDS

    name, *rest = study.command
    given = [*rest, *options(config, study), "--out", str(config.out / study.name)]
    folder = config.out / study.name
    print(f"\n=== codi {' '.join([name, *given])}", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", COMMANDS[name].module, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None and process.stderr is not None
    # Progress bars come through as they are written; the end of them is kept, because an error is one line there.
    tail = bytearray()

    def pass_on() -> None:
        while piece := process.stderr.read(4096):  # type: ignore[union-attr]
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
            tail.extend(piece)
            del tail[:-4000]

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    printed = process.stdout.read().decode()
    code = process.wait()
    reader.join()
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, 2):
        raise RuntimeError(f"codi {' '.join(study.command)} broke off with exit code {code}")
    folder.mkdir(parents=True, exist_ok=True)
    if code == 0:
        (folder / "refused.txt").unlink(missing_ok=True)
        (folder / "printed.md").write_text(printed, encoding="utf-8")
        return
    lines = [line for line in tail.decode(errors="replace").splitlines() if " error: " in line]
    reason = lines[-1].split(" error: ", 1)[1] if lines else "no reason given"
    if (folder / "printed.md").exists():  # it ran here before: not the model is refused but the folder or an option
        raise ValueError(f"codi {' '.join(study.command)}: {reason}")
    (folder / "refused.txt").write_text(reason + "\n", encoding="utf-8")


def demoted(text: str) -> str:
    """What a study printed, as part of a page: headings two levels lower, aligned text fenced, tables as they are.

    A study prints Markdown (its first heading tells) or plain text with Markdown tables of claims at its end.
    """
    lines = text.strip().splitlines()
    n_rows = sum(line.startswith("|") for line in lines)
    if any(line.startswith(("#", "**")) for line in lines) or 2 * n_rows > len(lines):
        return "\n".join(re.sub(r"^#", "###", line) for line in lines)
    out: list[str] = []
    fenced = False
    for line in lines:
        table = line.startswith(("|", "- S", "- C"))
        if table and fenced:
            while out and not out[-1]:
                out.pop()
            out += ["```", ""]
            fenced = False
        elif not table and not fenced and line:
            out += ["", "```text"] if out else ["```text"]
            fenced = True
        out.append(line)
    return "\n".join([*out, "```"] if fenced else out)


def claims_of(folder: Path) -> list[Claim]:
    """The claims a study judged; none if it judged none."""
    file = folder / "claims.json"
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    whole: list[dict[str, Any]] = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    return [Claim(**row) for row in whole]


def claims_table(config: Config) -> list[str]:
    """The claims of all studies in one Markdown table."""
    rows = []
    for study in STUDIES:
        for claim in claims_of(config.out / study.name):
            command = " ".join(study.command)
            number = "–" if claim.verdict == "not testable" else claim.number
            rows.append(f"| `{command}` | {claim.name} | {claim.statement} | {number} | **{claim.verdict}** |")
    return ["| study | claim | statement | number | verdict |", "|---|---|---|---|---|", *rows] if rows else []


def section(study: Study, config: Config) -> list[str]:
    """The part of the page about one study; empty if it has not been run."""
    folder, page = config.out / study.name, config.page
    command = " ".join(study.command)
    head = [f"## `codi {command}`", "", study.question, ""]
    if (folder / "refused.txt").exists():
        return [*head, f"Not run on this model: {(folder / 'refused.txt').read_text(encoding='utf-8').strip()}", ""]
    if not (folder / "printed.md").exists():
        return []
    shown = []
    for name in study.figures:
        found = next((f for f in (folder / "figures" / f"{name}.png", folder / f"{name}.png") if f.exists()), None)
        if found is None:
            continue
        target = page.with_suffix("") / f"{study.name}-{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.read_bytes())
        shown += [f"![{study.name}: {name.replace('_', ' ')}]({page.stem}/{target.name})", ""]
    text = (folder / "printed.md").read_text(encoding="utf-8")
    return [*head, demoted(text), "", *shown]


def write_page(config: Config) -> None:
    """Write the page from what the folders of the studies hold."""
    page = config.page
    title = f"# What the studies show: {config.model}"
    before = page.read_text(encoding="utf-8") if page.exists() else f"{title}\n\n{MARKER}\n"
    if MARKER not in before:
        raise ValueError(f"{page} is not a page of this command (it has no line {MARKER!r}): choose another --page")
    kept = before.split(MARKER)[0].rstrip()
    parts = [kept, "", MARKER, ""]
    claims = claims_table(config)
    if claims:
        parts += ["## Published claims", "", "Held: the whole 95 % interval lies on the claimed side. The rule and the",
                  "notes of each are in the section of its study.", "", *claims, ""]  # fmt: skip
    for study in STUDIES:
        parts += section(study, config)
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_suffix(".tmp")
    partial.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    partial.replace(page)


def main(config: Config) -> None:
    """Run the studies and write the page.

    Raises:
        ValueError: `page` is somebody else's file, or no study could be run on this model.
    """
    if config.page.exists() and MARKER not in config.page.read_text(encoding="utf-8"):
        raise ValueError(f"{config.page} is not a page of this command (no marker line in it): choose another --page")
    chosen: Sequence[Study] = [study for study in STUDIES if not config.only or study.name in config.only]
    for study in chosen:
        run(study, config)
        write_page(config)
    refused = [study.name for study in chosen if (config.out / study.name / "refused.txt").exists()]
    if len(refused) == len(chosen):
        reason = (config.out / refused[-1] / "refused.txt").read_text(encoding="utf-8").strip()
        raise ValueError(f"no study could be run on {config.model}: {reason}")
    print(f"{len(chosen) - len(refused)} studies in {config.out}; the page is {config.page}")
    if refused:
        print(f"not run on this model, see the page: {', '.join(refused)}")


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
