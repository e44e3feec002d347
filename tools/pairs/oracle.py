"""The oracle's settings and requests, and the errors file."""

import codecs
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from spot_megatron.errors import PairError
from spot_megatron.files import Row, answer_field, id_field, parse_line, text_field
from tools.pairs.client import BOUNDS
from tools.pairs.conversation import read_prompt, shown_problem
from tools.pairs.prompts import rectify_messages

HUMAN = "human"  # the model name under which a person's edits are filed


@dataclass(frozen=True)
class Oracle:
    """The model that edits, and its sampling settings. `temperature` None leaves the server's default."""

    model: str
    with_answer: bool = False
    max_tokens: int = 32768
    temperature: float | None = None
    top_p: float | None = None
    thinking: str = "server"
    extra_body: dict[str, Any] = field(default_factory=dict)

    def request(self, error: Row, failures: list[tuple[str, str]], previous: str | None = None) -> dict[str, Any]:
        """The body of the next attempt's request."""
        answer = error["answer"] if self.with_answer else None
        body: dict[str, Any] = {
            "model": self.model,
            "messages": rectify_messages(shown_problem(error), error["response"], answer, failures, previous),
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if self.thinking != "server":
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking == "on"}
        body |= self.extra_body
        return {key: value for key, value in body.items() if value is not None}

    def check_bounded(self) -> None:
        """Raises PairError unless every request says how much may be written at most, which a budget needs."""
        bounds = {"max_tokens": self.max_tokens, **self.extra_body}
        given = {key: bounds[key] for key in BOUNDS if bounds.get(key) is not None}
        wrong = {key: value for key, value in given.items() if type(value) is not int or value < 1}
        if wrong or not given:
            said = f"holds {json.dumps(wrong)}" if wrong else "takes max_tokens away"
            raise PairError(
                f"--extra-body {said}, so that --budget-usd cannot know what a request costs at most. Set max_tokens "
                "or max_completion_tokens to a whole number above 0."
            )


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise PairError(f"{path}: cannot be read ({error.strerror}); check the path") from None


class ErrorFile(Mapping[str, Row]):
    """The rows of an errors.jsonl by id, in its order; only their places are in memory, a row is read when asked for.

    Raises PairError naming file and line for a missing field or a repeated id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # id -> (line number, byte offset)
        self._file = open_file(path)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                identifier = id_field(self._parse(line, number), f"{path}:{number}")
                if identifier in self._places:
                    raise PairError(
                        f"{path}:{number}: id {identifier!r} occurs twice; every wrong sample needs an id of its own"
                    )
                self._places[identifier] = number, offset
            offset += len(line)
        if not self._places:
            raise PairError(f"{path}: holds no errors, so there is nothing to rectify")

    def _parse(self, line: bytes, number: int) -> Row:
        where = f"{self.path}:{number}"
        row = parse_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
        for key in ("question", "response"):
            text_field(row, key, where)
        row["answer"] = answer_field(row, "answer", where)
        read_prompt(row, where)
        return row

    def __getitem__(self, identifier: str) -> Row:
        number, offset = self._places[identifier]
        self._file.seek(offset)
        return self._parse(self._file.readline(), number)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class Choice:
    """Which errors are rectified, and in which order.

    Attributes:
        pass_rate: keeps errors whose question was answered right in that share (both ends included) of its samples.
        one_per_question: keeps one error of each question, drawn by the seed.
        seed: of the draw and of the order; None keeps the file's order.
    """

    pass_rate: tuple[float, float] = (0.0, 1.0)
    one_per_question: bool = False
    seed: int | None = None

    def sort(self, errors: Mapping[str, Row]) -> tuple[list[str], Counter[str]]:
        """(ids in the order of their attempts, how many errors each rule left out)."""
        left_out: Counter[str] = Counter()
        chosen: list[str] = []
        questions: set[str] = set()
        names = list(errors)
        if self.seed is not None:
            random.Random(self.seed).shuffle(names)
        if self == Choice(seed=self.seed):
            return names, left_out
        low, high = self.pass_rate
        for name in names:
            error = errors[name]
            question = str(error.get("question_id", name))
            if self.pass_rate != (0.0, 1.0) and not low <= _pass_rate(error, name) <= high:
                left_out["pass_rate"] += 1
            elif self.one_per_question and question in questions:
                left_out["another_of_its_question"] += 1
            else:
                questions.add(question)
                chosen.append(name)
        return chosen, left_out


def _pass_rate(error: Row, name: str) -> float:
    rate = error.get("pass_rate")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise PairError(
            f"error {name!r} has no `pass_rate`, which --pass-rate needs; make the errors file with "
            "`tools.elicit --samples N`, or leave --pass-rate out"
        )
    return float(rate)
