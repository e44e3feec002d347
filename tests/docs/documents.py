"""The documents of the repository, and what their code blocks hold."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob(".github/**/*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "tools/pairs/README.md",
        ROOT / "recipes/assets/qwen3_tiny/README.md",
        ROOT / "tests/golden/trl/README.md",
    ]
)
HISTORY = ("CHANGELOG.md",)  # names commands and files of its time
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PROGRAMS = ("make", "python", "pytest", "torchrun")


@dataclass(frozen=True)
class Command:
    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(path.read_text()) if found == language]


def spans(path: Path) -> list[str]:
    """Code between single backticks, outside of fenced blocks."""
    return SPAN.findall(FENCE.sub("", path.read_text()))


def commands(path: Path) -> list[Command]:
    """Every line of a bash block, and every span that begins with a program and has an argument."""
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(path) if span.split()[0] in PROGRAMS and len(span.split()) > 1]
    found = (tuple(shlex.split(line, comments=True)) for line in lines)
    return [Command(name_of(path), words) for words in found if words]


def all_commands() -> list[Command]:
    """Each command once."""
    every = [command for path in DOCUMENTS if path.name not in HISTORY for command in commands(path)]
    return list({command.words: command for command in every}.values())
