"""The shell commands that the documentation shows, block by block."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.support.processes import ROOT

PAGES = ("README.md", "slurm/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))
GENERATED = ("docs/reference.md",)
"""Pages whose commands stand in the code and are looked at there."""

_SHELL = ("", "bash", "sh", "console")
_WORDS = (
    *("dispatcher", "python", "bash", "sbatch", "curl", "export", "tail", "zcat"),
    "huggingface-cli",
)
_COMMAND = re.compile(rf"(?:[A-Z_]+=(?:\"[^\"]*\"|\S)+\s+)*(?:\S*/)?(?:{'|'.join(_WORDS)})\b")


@dataclass(frozen=True)
class Block:
    """Lines of a page that stand together and begin with a command."""

    page: str
    line: int
    text: str

    @property
    def name(self) -> str:
        """Return where it stands."""
        return f"{self.page}:{self.line}"


def shown_blocks() -> list[Block]:
    """Return every block of commands of every page that people read."""
    pages = [page for page in PAGES if page not in GENERATED]
    return [block for page in pages for block in blocks_of(page, (ROOT / page).read_text())]


def help_blocks(parsers: Mapping[str, argparse.ArgumentParser]) -> list[Block]:
    """Return the examples that --help shows: each by itself, but what stands under a comment."""
    found = []
    for name, parser in parsers.items():
        for paragraph in (parser.epilog or "").split("\n\n"):
            text = "\n".join(line[2:] for line in paragraph.splitlines() if line.startswith("  "))
            examples = [text] if text.startswith("#") else commands_of(text)
            found += [Block(f"{name} --help", n, each) for n, each in enumerate(examples, 1)]
    return found


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Yield the blocks of commands of one page, from its first line on."""
    for line, kind, lines in _marked_blocks(text):
        if kind in _SHELL and any(map(_COMMAND.match, commands_of("\n".join(lines)))):
            yield Block(page, line, "\n".join(lines).rstrip())


def commands_of(text: str) -> list[str]:
    """Return a block's commands, each on one line."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _marked_blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield fenced and indented blocks: first line's number, the fence's language, the lines."""
    kind: str | None = None
    lines: list[str] = []
    begun = 0
    before = ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if line.lstrip().startswith("```"):
            if kind is None:
                kind, lines, begun = line.strip("` "), [], number + 1
            else:
                yield begun, kind, lines
                kind, lines = None, []
        elif kind is not None:
            lines.append(line)
        elif line.startswith("    ") and (lines or not before.strip()):
            if not lines:
                begun = number
            lines.append(line[4:])
        elif line.strip() or number > len(text.splitlines()):
            if lines:
                yield begun, "", lines
            lines = []
        elif lines:
            lines.append("")
        before = line


def yaml_block(page: str, having: str) -> str:
    """Return the first YAML block of a page that contains a text."""
    for _, kind, lines in _marked_blocks((ROOT / page).read_text()):
        block = "\n".join(lines)
        if kind in ("yaml", "") and having in block:
            return block + "\n"
    raise AssertionError(f"{page} shows no YAML with {having!r}")
