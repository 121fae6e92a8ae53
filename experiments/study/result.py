"""What a study found, as a file: `result.json` in its run folder, which summaries, pages and reports read.

    study, title, command, model    which study, how it is asked for, of which model
    sections                        [{heading, text, form}] the summary in words, Markdown (or plain text in columns)
    tables                          [{name, file, rows, columns}] CSV files of the run folder
    figures                         [{name, files, caption}] PNG and PDF files of the run folder
    claims                          the published claims that were judged; NaN is null

`Result.write` makes the file, `Result.read` reads it, `Result.markdown` is what a command prints. Everything that is
shown of a study comes from here: nobody parses what was printed. Knows nothing about how results are computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from experiments.study.claims import ClaimsTable

__all__ = ["FILE", "FigureFiles", "Result", "Section", "Tables"]

FILE = "result.json"
FORMAT = 1


@dataclass(frozen=True)
class Section:
    """One paragraph or table of a summary.

    Attributes:
        text: Markdown without headings; or plain text that keeps its line ends and blanks.
        heading: "": it needs none.
        form: "markdown" or "plain".
    """

    text: str
    heading: str = ""
    form: Literal["markdown", "plain"] = "markdown"

    def markdown(self) -> str:
        """The section as it is printed."""
        end = "" if self.heading.endswith("?") else "."
        return f"**{self.heading}{end}** {self.text}" if self.heading else self.text


@dataclass(frozen=True)
class FigureFiles:
    """A figure of the run folder.

    Attributes:
        name: as in "necessity".
        files: paths inside the run folder, the PNG first.
        caption: what it shows.
    """

    name: str
    files: tuple[str, ...]
    caption: str = ""


class Tables(Mapping[str, pd.DataFrame]):
    """Tables by name, those of a folder read when they are asked for."""

    def __init__(self, frames: Mapping[str, pd.DataFrame | Path]) -> None:
        self._frames: dict[str, pd.DataFrame | Path] = dict(frames)

    def __getitem__(self, name: str) -> pd.DataFrame:
        found = self._frames[name]
        if isinstance(found, Path):
            found = pd.read_csv(found, keep_default_na=False, na_values=[""])
            self._frames[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._frames)

    def __len__(self) -> int:
        return len(self._frames)


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        study: its command, such as "necessity" or "lens detect".
        title: "Necessity of latents".
        command: as it is typed, with every option that is not at its default.
        model: name of the model.
        path: its run folder.
        sections: the summary in words.
        tables: by name; in the folder they are {name}.csv.
        figures: in the order in which they are shown.
        claims: published claims, if any are in its scope.
    """

    study: str
    title: str
    command: str
    model: str
    path: Path
    sections: tuple[Section, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: tuple[FigureFiles, ...] = ()
    claims: ClaimsTable | None = None

    @property
    def text(self) -> str:
        """What the command prints."""
        return self.markdown()

    def markdown(self) -> str:
        """Title, sections, claims, and where the files are."""
        parts = [f"# {self.title}: {self.model}", *(section.markdown() for section in self.sections)]
        if self.claims is not None:
            parts += ["## Published claims", self.claims.markdown()]
        shown = sorted(Path(file).name for figure in self.figures for file in figure.files if file.endswith(".png"))
        parts.append(f"Tables and trials: {self.path}; figures (PNG and PDF): {', '.join(shown) or 'none'}.")
        return "\n\n".join(parts)

    def record(self) -> dict[str, Any]:
        """The content of result.json."""
        tables = [
            {"name": name, "file": f"{name}.csv", "rows": len(table), "columns": list(map(str, table.columns))}
            for name, table in self.tables.items()
        ]
        return {
            "format": FORMAT,
            "study": self.study,
            "title": self.title,
            "command": self.command,
            "model": self.model,
            "sections": [asdict(section) for section in self.sections],
            "tables": tables,
            "figures": [asdict(figure) for figure in self.figures],
            "claims": None if self.claims is None else self.claims.records(),
        }

    def write(self, write: Callable[[str, bytes], Path]) -> None:
        """Write result.json and summary.md; tables, figures and claims are there already.

        Args:
            write: takes a name and the content and gives the path; a run folder's `write`.
        """
        text = json.dumps(self.record(), indent=2, ensure_ascii=False, allow_nan=False)
        write(FILE, (text + "\n").encode())
        write("summary.md", (self.markdown() + "\n").encode())

    @classmethod
    def read(cls, folder: str | Path) -> Result:
        """The result of a run folder; its tables are read when they are asked for.

        Raises:
            ValueError: no result there, or one that is damaged or of another version.
        """
        path = Path(folder)
        try:
            found = json.loads((path / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} has no {FILE}: run its command to the end") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / FILE} is damaged: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{path / FILE} is damaged or of another version: run its command again")
        return cls(
            found["study"],
            found["title"],
            found["command"],
            found["model"],
            path,
            tuple(Section(**section) for section in found["sections"]),
            Tables({table["name"]: path / table["file"] for table in found["tables"]}),
            tuple(FigureFiles(one["name"], tuple(one["files"]), one["caption"]) for one in found["figures"]),
            None if found["claims"] is None else ClaimsTable.from_records(found["claims"]),
        )
