"""Who rectifies and how it is asked, and the errors that it is given."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row, answer_field, id_field, read_rows, text_field
from tools.pairs.client import BOUNDS
from tools.pairs.conversation import read_prompt, shown_problem
from tools.pairs.prompts import rectify_messages

HUMAN = "human"  # the model name under which a person's edits are filed


@dataclass(frozen=True)
class Oracle:
    """Who edits and how it is asked. `temperature` and `thinking` None leave the server's own defaults."""

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


def read_errors(path: Path) -> dict[str, Row]:
    """Rows of errors.jsonl by id. Raises PairError naming file and line for a missing field or a repeated id."""
    errors: dict[str, Row] = {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        for key in ("question", "response"):
            text_field(row, key, where)
        row["answer"] = answer_field(row, "answer", where)
        read_prompt(row, where)
        identifier = id_field(row, where)
        if identifier in errors:
            raise PairError(f"{where}: id {identifier!r} occurs twice. Every wrong sample needs an id of its own.")
        errors[identifier] = row
    if not errors:
        raise PairError(f"{path}: holds no errors, so there is nothing to rectify.")
    return errors
