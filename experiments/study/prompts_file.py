"""The prompts of a run, in its folder: what stands behind the prompt ids of its trial tables.

    prompts.jsonl   one record per prompt: side (evaluation or derivation), id, question, answer, steps, cluster

Written once, when a run begins or goes on; folders of early versions have none until then. The questions are those that
the model read, with the sentence that its training questions ended in, if there was one.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.study.folder import RunFolder
from experiments.tasks.split import Split

__all__ = ["FILE", "questions_of", "write_prompts"]

FILE = "prompts.jsonl"


def write_prompts(folder: RunFolder, prompts: Split) -> None:
    """Write the prompts of an open run folder, if they are not there; a prompt on both sides is written once."""
    if (folder.path / FILE).exists():
        return
    sides = {"evaluation": prompts.evaluation, "derivation": prompts.derivation}
    seen: set[str] = set()
    lines = []
    for side, problems in sides.items():
        for problem in problems:
            if problem.prompt_id in seen:
                continue
            seen.add(problem.prompt_id)
            record = {
                "side": side,
                "id": problem.prompt_id,
                "question": problem.question,
                "answer": problem.answer,
                "steps": list(problem.steps),
                "cluster": problem.cluster,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    folder.write(FILE, "".join(lines).encode())


def questions_of(run: Path) -> dict[str, str]:
    """Question of every prompt id of a run folder; empty for a folder of an early version.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / FILE
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    try:
        for line in path.read_bytes().decode().split("\n"):
            if line:
                record = json.loads(line)
                found[record["id"]] = record["question"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, the run's command writes it again") from None
    return found
