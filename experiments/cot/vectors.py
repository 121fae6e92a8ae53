"""The vectors that `codi cot derive` wrote: the whole one, those without one family of sets, and shuffled ones.

Also the promise across commands that questions are not used twice: a folder says which ones it used (`used_by`), and
whoever goes on from it refuses to use one of them again.

Knows nothing about how vectors are applied or judged.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cot.places import CHOICE, ITEMS, SHUFFLED, VECTOR, WITHOUT
from experiments.study.parts import Workbench
from experiments.tasks.items import Item
from lm.model import LanguageModel
from steering.control_vectors import ControlVector
from steering.vector_controls import random_vector
from steering.vector_files import load_vector, save_vector

__all__ = ["Vectors", "folder_hash", "read_choice", "refuse_used", "used_by", "vector_bytes", "vectors_of"]


@dataclass(frozen=True)
class Vectors:
    """What can be added to the residual stream.

    Attributes:
        whole: from all sets.
        without: family -> from the other sets; empty where there is one family only.
        shuffled: controls, with the norms of the whole one.
    """

    whole: ControlVector
    without: Mapping[str, ControlVector]
    shuffled: Sequence[ControlVector]

    @classmethod
    def read(cls, folder: Path, model: LanguageModel | None = None) -> Vectors:
        """From the folder of `codi cot derive`.

        Raises:
            ValueError: no vector there, a damaged one, or one of another model.
        """
        whole = load_vector(folder / VECTOR, model)
        prefix, suffix = WITHOUT.split("{family}")
        without = {
            path.name.removesuffix(suffix).removeprefix(Path(prefix).name): load_vector(path, model)
            for path in sorted(folder.glob(WITHOUT.format(family="*")))
        }
        shuffled: list[ControlVector] = []
        while (folder / SHUFFLED.format(draw=len(shuffled))).is_file():
            shuffled.append(load_vector(folder / SHUFFLED.format(draw=len(shuffled)), model))
        return cls(whole, without, tuple(shuffled))

    def of(self, kind: str, draw: int, family: str, seed: int) -> ControlVector:
        """The vector of a condition.

        Args:
            kind: "all", "held-out", "random" or "shuffled".
            draw: of the last two.
            family: of the question; "held-out" is the vector without it, the whole one if it never was in it.
            seed: of random vectors.
        """
        if kind == "random":
            return random_vector(self.whole, draw, seed)
        if kind == "shuffled":
            return self.shuffled[draw]
        assert kind in ("all", "held-out"), f"no vector is called {kind!r}"
        return self.without.get(family, self.whole) if kind == "held-out" else self.whole


def vectors_of(bench: Workbench, folder: str) -> Vectors:
    """The vectors of a folder, read once per process: for `Workbench.once`."""
    return Vectors.read(Path(folder), bench.model)


def vector_bytes(vector: ControlVector) -> bytes:
    """Content of the file of a vector."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.safetensors"
        save_vector(path, vector)
        return path.read_bytes()


def folder_hash(folder: Path) -> str:
    """SHA-256 over the vectors of a folder and where they come from: part of the identity of runs that use them.

    Over what they hold, not over the files: the header of a safetensors file has no fixed order.
    """
    digest = hashlib.sha256()
    for path in sorted((folder / VECTOR).parent.glob("*.safetensors")):
        vector = load_vector(path)
        origin = vector.origin
        digest.update(repr((path.name, vector.layers, origin.model_hash, origin.n, origin.data_digest)).encode())
        digest.update(vector.tensor().numpy().tobytes())
    return digest.hexdigest()


# --- Which questions were used ----------------------------------------------------------------------------------------


def used_by(items: Sequence[Item], part: str) -> bytes:
    """Content of the file that says which questions and clusters a run used."""
    used = sorted({_mark(trait) for item in items for trait in _traits(item)})
    return (json.dumps({"part": part, "used": used}) + "\n").encode()


def refuse_used(folder: Path, items: Sequence[Item], part: str) -> None:
    """Raise ValueError if a run used a question, or a cluster of questions, that is to be used again.

    Args:
        folder: of the run.
        items: that are to be used.
        part: what for, in words.
    """
    content = _read_json(folder / ITEMS)
    used = set(content.get("used", ()))
    again = [item for item in items if any(_mark(trait) in used for trait in _traits(item))]
    if again:
        raise ValueError(
            f"{len(again)} of {len(items)} {part} questions share a text or a cluster with the {content.get('part')} "
            f"questions of {folder} (such as {again[0].prompt_id}): give the same --seed, sets and numbers to both "
            "commands"
        )


def read_choice(folder: Path) -> dict[str, tuple[int, float]]:
    """What a grid chose: way of steering -> layer and coefficient.

    Raises:
        ValueError: no choice there, or a damaged file.
    """
    content = _read_json(folder / CHOICE)
    try:
        return {way: (int(one["layer"]), float(one["coefficient"])) for way, one in content["chosen"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CHOICE} is damaged: run codi cot grid again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}: run the command of that folder to the end") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def _traits(item: Item) -> list[str]:
    traits = ["question " + " ".join(item.question.split())]
    return [*traits, f"cluster {item.cluster}"] if item.cluster else traits


def _mark(trait: str) -> str:
    return hashlib.sha256(trait.encode()).hexdigest()[:24]
