"""Data sets of the Hugging Face hub, and local folders in the same layout, through `datasets`.

Knows nothing about what a record means (experiments/tasks/readers/records.py).
"""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.problem import Problem
from experiments.tasks.readers.files import FILE_TYPES, Placed
from experiments.tasks.readers.records import problems_of, unique

__all__ = ["HUB_DEFAULTS", "TASK_HELP", "hub_records", "named", "read_hub"]

# hub id -> (configuration, split that the published CODI evaluation reads)
HUB_DEFAULTS: dict[str, tuple[str | None, str]] = {
    "openai/gsm8k": ("main", "test"),
    "zen-E/GSM8k-Aug": (None, "test"),
    "whynlp/gsm8k-aug": (None, "test"),
    "ChilleD/SVAMP": (None, "train+test"),
    "ChilleD/MultiArith": (None, "test"),
    "juyoung-trl/gsm-hard": (None, "train"),
}

TASK_HELP = (
    "allowed: arithmetic, polynomial (or such as polynomial:m=97,b=3), templates, word-problems, a file ending in "
    f"{', '.join(FILE_TYPES)}, a folder of such .txt files or in the layout of a hub data set, or a hub id such as "
    f"{', '.join(HUB_DEFAULTS)}"
)


def read_hub(source: str, split: str = "test", decimal_comma: bool = False) -> list[Problem]:
    """Problems of a hub data set or of a local folder in the same layout.

    Args:
        source, split: see `hub_records`.
        decimal_comma: see `read_problems`.

    Raises:
        ValueError: it cannot be loaded, there is no such split, or a record is refused.
    """
    stem = Path(named(source)[0]).name
    problems: list[tuple[str, Problem]] = []
    for part, placed in hub_records(source, split).items():
        problems += problems_of(placed, f"{source} ({part})", f"{stem}-{part}", decimal_comma)
    return unique(problems, source)


def hub_records(source: str, split: str = "test") -> dict[str, list[Placed]]:
    """Records of a hub data set or of a local folder in the same layout, through `datasets`.

    Args:
        source: hub id or folder, with an optional configuration after a colon ("openai/gsm8k", "openai/gsm8k:main"). A
            folder with the last name of a known hub data set is taken for a copy of it.
        split: a split of the data set, "train+test" for both, or "published" (see `HUB_DEFAULTS`).

    Returns:
        By split, in the order that was asked for: records with their places.

    Raises:
        ValueError: it cannot be loaded, or there is no such split.
    """
    import datasets
    import pyarrow

    name, given = named(source)
    folder = Path(name).is_dir()
    known = {hub_id.split("/")[1]: hub_id for hub_id in HUB_DEFAULTS}
    configuration, published = HUB_DEFAULTS.get(known.get(Path(name).name, "") if folder else name, (None, None))
    if split == "published":
        if published is None:
            raise ValueError(f"split 'published' is known for {', '.join(HUB_DEFAULTS)} only, got {source!r}")
        split = published
    try:
        if folder:
            offered = datasets.get_dataset_config_names(name)
            if not given and len(offered) > 1 and configuration not in offered:
                raise ValueError(f"it has several configurations: write {name}:NAME, NAME one of {', '.join(offered)}")
            configuration = configuration if configuration in offered else None
        data = datasets.load_dataset(name, given or configuration)
    # ConnectionError and DatasetNotFoundError are OSErrors; a file in the folder that cannot be read is one of the rest
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = _reason(error)
        advice = "; without network, download it elsewhere and give the path of its folder instead of the id"
        advice = "" if folder else f"{advice}; {TASK_HELP}"
        raise ValueError(f"data set {source!r} cannot be loaded ({type(error).__name__}: {reason}){advice}") from error
    wanted = [part.strip() for part in split.split("+")]
    missing = [part for part in wanted if part not in data]
    if missing:
        raise ValueError(f"data set {source!r} has no split {missing[0]!r}; allowed: {', '.join(map(str, data))}")
    return {
        part: [(f"{source} ({part}): record {number}", record) for number, record in enumerate(data[part], start=1)]
        for part in wanted
    }


def named(source: str) -> tuple[str, str]:
    """Data set and configuration ("" if none is given)."""
    name, colon, configuration = source.rpartition(":")
    return (name, configuration) if colon and not Path(source).is_dir() else (source, "")


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; `datasets` keeps the cause of a file that cannot be read behind the error."""
    lines = [" ".join(str(error).split())]
    if error.__cause__ is not None and not isinstance(error, OSError):
        lines.append(" ".join(str(error.__cause__).split()))
    return ": ".join(line for line in lines if line)[:600]
