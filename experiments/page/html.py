"""A page of findings as one HTML file that needs no other: the Markdown of the page, its figures inside as data URIs.

Reads the Markdown that this project writes: headings, paragraphs, tables, lists, fenced text, bold, italic, code, links
and images. Everything else is shown as it stands. Knows nothing about studies.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["as_html"]

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
h1, h2 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1.5rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 85%; display: block; overflow-x: auto; margin: 1rem 0; }
th, td { border: 1px solid #ccc; padding: .25rem .5rem; text-align: left; vertical-align: top; }
pre, code { font: 85%/1.4 ui-monospace, monospace; background: #f5f5f5; } pre { padding: .75rem; overflow-x: auto; }
img { max-width: 100%; }
""".strip()
_KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def as_html(text: str, folder: Path) -> str:
    """A whole HTML document.

    Args:
        text: Markdown.
        folder: that paths of images start from; an image that is not there is shown as its description.
    """
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "Findings")
    body = "\n".join(_blocks(text, lambda alt, place: _image(alt, place, folder)))
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _image(alt: str, place: str, folder: Path) -> str:
    path = folder / place
    kind = _KINDS.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return f"[{html.escape(alt)}]"
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{content}">'


def _blocks(text: str, image: Callable[[str, str], str]) -> list[str]:
    """One HTML block per block of Markdown."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    blocks: list[str] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        heading = re.match(r"(#{1,6}) (.*)", line)
        start, at = at, at + 1
        if not line.strip():
            continue
        if line.startswith("```"):
            while at < len(lines) and not lines[at].startswith("```"):
                at += 1
            blocks.append(f"<pre>{html.escape(chr(10).join(lines[start + 1 : at]))}</pre>")
            at += 1
        elif heading:
            level = len(heading[1])
            blocks.append(f"<h{level}>{_inline(heading[2], image)}</h{level}>")
        else:
            kind = _kind(line)
            while at < len(lines) and lines[at].strip() and not re.match(r"#{1,6} |```", lines[at]):
                goes_on = kind == "list" and lines[at].startswith("  ")
                if _kind(lines[at]) != kind and not goes_on:
                    break
                at += 1
            blocks.append(_block(kind, lines[start:at], image))
    return blocks


def _kind(line: str) -> str:
    return "table" if line.startswith("|") else "list" if re.match(r"[-*] ", line) else "text"


def _block(kind: str, lines: list[str], image: Callable[[str, str], str]) -> str:
    if kind == "text":
        return f"<p>{_inline(' '.join(lines), image)}</p>"
    if kind == "list":
        items = re.split(r"^[-*] ", "\n".join(lines), flags=re.M)[1:]
        return "<ul>" + "".join(f"<li>{_inline(' '.join(item.split()), image)}</li>" for item in items) + "</ul>"
    rows = []
    for number, line in enumerate(lines):
        if number == 1 and re.fullmatch(r"[|:\- ]+", line):
            continue
        cells = re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))
        tag = "th" if number == 0 else "td"
        shown = "".join(f"<{tag}>{_inline(cell.strip().replace(chr(92) + '|', '|'), image)}</{tag}>" for cell in cells)
        rows.append(f"<tr>{shown}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _inline(text: str, image: Callable[[str, str], str]) -> str:
    """Escaped text with its code, images, links, bold and italic words."""
    kept: list[str] = []

    def keep(made: str) -> str:
        kept.append(made)
        return f"\0{len(kept) - 1}\0"

    text = re.sub(r"`([^`]+)`", lambda m: keep(f"<code>{html.escape(m[1])}</code>"), text.replace("\0", ""))
    text = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", lambda m: keep(image(m[1], m[2])), text)
    text = re.sub(
        r"\[([^\]]+)\]\(([^)\s]+)\)",
        lambda m: keep(f'<a href="{html.escape(m[2])}">{html.escape(m[1], quote=False)}</a>'),
        text,
    )
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*(?!\*)", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?![\w*])", r"<em>\1</em>", text)
    while re.search("\0\\d+\0", text):
        text = re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], text)
    return text
