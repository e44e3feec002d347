"""Questions that a benchmark holds, too: the same normalised text, or a common run of 13 words."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tools.pairs.questions import QuestionSet, read_texts

NUM_WORDS = 13


class Benchmark:
    """The texts of benchmark files: JSONL or Parquet rows with a question, answers not needed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._texts: set[tuple[str, ...]] = set()
        self._runs: set[int] = set()
        for path in paths:
            for text in read_texts(path):
                words = _words(text)
                self._texts.add(words)
                self._runs.update(_runs(words))

    def holds(self, text: str) -> bool:
        words = _words(text)
        return words in self._texts or any(run in self._runs for run in _runs(words))

    def drop_from(self, found: QuestionSet) -> None:
        """Take the questions that this benchmark holds out of the set, counted as `contaminated`."""
        clean = [question for question in found.questions if not self.holds(question.question)]
        if len(clean) < len(found.questions):
            found.dropped["contaminated"] = len(found.questions) - len(clean)
            found.questions = clean


def _words(text: str) -> tuple[str, ...]:
    """Letters and digits only, lower case, so that notation and layout do not hide a copy."""
    return tuple(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower()))


def _runs(words: tuple[str, ...]) -> set[int]:
    return {hash(words[start : start + NUM_WORDS]) for start in range(len(words) - NUM_WORDS + 1)}
