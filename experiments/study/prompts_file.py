"""The prompts of a run, in its folder: what stands behind the prompt ids of its trial tables.

    prompts.jsonl   one record per prompt: side (evaluation, derivation, …), id, question, answer, steps, cluster

Written once, when a run begins or goes on; folders of early versions have none until then. The questions are those that
the model read, with the sentence that its training questions ended in, if there was one.
"""

from __future__ import annotations

import json
from pathlib import Path

from experiments.study.folder import RunFolder
from experiments.study.parts import Prompts

__all__ = ["FILE", "questions_of", "write_prompts"]

FILE = "prompts.jsonl"


def write_prompts(folder: RunFolder, prompts: Prompts) -> None:
    """Write the prompts of an open run folder, if they are not there; a prompt on two sides is written once."""
    if (folder.path / FILE).exists():
        return
    records = {record["id"]: record for record in reversed(prompts.records())}  # the first of each id stays
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in reversed(records.values())]
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
