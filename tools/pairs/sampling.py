"""Sampling settings and the requests made from them; shards of the questions."""

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row
from tools.pairs.prompts import elicit_messages
from tools.pairs.questions import Question

Key = tuple[str, int]  # question id, sample


@dataclass(frozen=True)
class Sampling:
    """Everything besides the question that an answer depends on. A journal holds answers of one Sampling only."""

    model: str
    temperature: float = 0.7
    top_p: float = 0.8
    max_tokens: int = 32768
    thinking: str = "off"  # off | on | server: enable_thinking of the chat template
    suffix: str = ""
    seed: int = 1234
    token_ids: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def request(self, question: Question, sample: int) -> dict[str, Any]:
        """The body of one chat completion request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages(question),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": _request_seed(self.seed, question.id, sample),
        }
        if self.thinking != "server":
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking == "on"}
        if question.tools:
            body["tools"] = list(question.tools)
        if self.token_ids:
            body["return_token_ids"] = True
        body |= self.extra_body
        return {key: value for key, value in body.items() if value is not None}

    def messages(self, question: Question) -> list[Row]:
        """The prompt; a question that came as a conversation is sent unchanged."""
        if question.messages:
            return list(question.messages)
        return [*question.context, *elicit_messages(question.question, self.suffix)]


def read_sampling(journal: Path) -> Sampling:
    """The settings kept beside a journal. Raises PairError when they are missing or damaged."""
    side = journal.with_name(journal.name + ".settings.json")
    try:
        return Sampling(**json.loads(side.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PairError(f"{side}: cannot be read ({error}). Copy it together with its journal.") from None


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, by a hash of the question id, so that machines need not agree on the file's order."""

    index: int
    count: int

    def holds(self, question_id: str) -> bool:
        return zlib.crc32(question_id.encode()) % self.count == self.index

    def name(self, stem: str, suffix: str) -> str:
        return f"{stem}.shard-{self.index}-of-{self.count}{suffix}"


def _request_seed(run_seed: int, question_id: str, sample: int) -> int:
    digest = hashlib.sha256(f"{run_seed}/{question_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def error_id(key: Key) -> str:
    """The id of one sample in errors.jsonl: the question's own for the first, `id#k` for further ones."""
    return key[0] if key[1] == 0 else f"{key[0]}#{key[1]}"
