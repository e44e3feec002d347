"""Questions with known answers, from the files in which they are published."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row, answer_field, read_rows
from tools.pairs.conversation import prompt_hash, text_of, whole_prompt
from tools.pairs.grade import unusable_gold

# In any case: AIME_2024 writes Problem, Answer and ID
_QUESTION_KEYS = ("question", "prompt", "problem")
_ANSWER_KEYS = ("answer", "ground_truth", "final_answer", "solution")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")

# DAPO-Math-17k wraps every problem in an instruction to answer on an "Answer:" line, which this pipeline's box
# replaces.
_DAPO_WRAPPER = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\\?\$Answer.*?\n\n(.*?)\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*\Z",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its known answer.

    `messages` is the conversation to send unchanged, or None where the question is a text; `context` holds the turns
    before such a text, from the columns `system` and `history`; `tools` are sent with either.
    """

    id: str
    question: str
    answer: str
    messages: tuple[Row, ...] | None = None
    context: tuple[Row, ...] = ()
    tools: tuple[Row, ...] | None = None

    def prompt_hash(self) -> str:
        """16 hexadecimal digits of all that shapes the prompt, without the closing instruction."""
        messages = self.messages or (*self.context, {"role": "user", "content": self.question})
        return prompt_hash(messages, self.tools)


@dataclass
class QuestionSet:
    """The questions of a file in its order, and what became of every other row."""

    questions: list[Question] = field(default_factory=list)
    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def read_questions(path: Path, english_only: bool = False) -> QuestionSet:
    """Read JSONL, packed or not, or Parquet.

    Understood rows: {question | prompt | problem, answer | ground_truth | final_answer | solution}, in any case,
    optional `id`; GSM8K, whose answer follows "####"; solutions that end in a box (MATH); lists of answers
    (OlympiadBench); DAPO-Math-17k and its processed form, with prompt messages and reward_model.ground_truth.
    The id is the row's `id`, else extra_info.index, else a hash of the whole prompt, so it survives reordering.
    Repeated questions (DAPO has a hundred copies of each) and, with `english_only`, Chinese ones are dropped, counted.

    Raises PairError naming file and line for a row without question or answer, an answer that no response can match,
    or an id that two questions share.
    """
    found = QuestionSet()
    seen: dict[str, tuple[str, str]] = {}
    for where, row in _read_rows(path):
        found.num_rows += 1
        question = parse_question(row, where)
        fingerprint = (question.prompt_hash(), question.answer)
        if question.id in seen:
            if seen[question.id] != fingerprint:
                raise PairError(
                    f"{where}: id {question.id!r} already belongs to another question or answer. "
                    "Give every question an id of its own."
                )
            found.dropped["duplicate"] += 1
        elif english_only and _CHINESE.search(question.question):
            found.dropped["not_english"] += 1
        else:
            seen[question.id] = fingerprint
            found.questions.append(question)
    if not found.questions:
        raise PairError(f'{path}: holds no question. Give rows like {{"id": ..., "question": ..., "answer": ...}}.')
    return found


def read_texts(path: Path) -> Iterator[str]:
    """The question texts of a file, whose rows need no answers. Raises PairError for a row without a question."""
    for where, row in _read_rows(path):
        yield text_of(whole_prompt(row, _asked(row, where), where)[0][-1])


def _asked(row: Row, where: str) -> Any:
    _, asked = _field(row, _QUESTION_KEYS, where)
    if asked is None:
        raise PairError(f"{where}: no question. Expected one of the keys {', '.join(_QUESTION_KEYS)}.")
    return asked


def _read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    return ((f"{path}:{number}", row) for number, row in read_rows(path))


def parse_question(row: Row, where: str) -> Question:
    """The question of one row of any known shape, with an answer that a response can match.

    Raises PairError whose message starts with `where`: no question, no answer, or one that no response can match.
    """
    asked = _asked(row, where)
    turns, tools = whole_prompt(row, asked, where)
    text = text_of(turns[-1])
    wrapped = _DAPO_WRAPPER.match(text) if len(turns) == 1 else None
    if wrapped:
        text = wrapped[1].strip()
    if not text.strip():
        raise PairError(f"{where}: the question is empty.")
    is_text = isinstance(asked, str) or wrapped is not None
    question = Question(
        id="",
        question=text,
        answer=_answer(row, where),
        messages=None if is_text else tuple(turns),
        context=tuple(turns[:-1]) if is_text else (),
        tools=None if tools is None else tuple(tools),
    )
    return replace(question, id=_identifier(row, where) or f"q-{question.prompt_hash()}")


def _field(row: Row, keys: Sequence[str], where: str) -> tuple[str, Any]:
    """(key as written, value) of the first of these keys that holds something, in whatever case; else ("", None)."""
    for key in keys:
        found = [name for name in row if name.lower() == key and row[name] is not None]
        if len(found) > 1:
            raise PairError(f"{where}: both {' and '.join(map(repr, found))} are given. Keep one of them.")
        if found:
            return found[0], row[found[0]]
    return "", None


def _identifier(row: Row, where: str) -> str | None:
    extra = row.get("extra_info")
    value = _field(row, ("id",), where)[1]
    if value is None and isinstance(extra, dict):
        value = extra.get("index")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value):
        raise PairError(f"{where}: the id {value!r} must be text or a whole number.")
    return str(value)


def _answer(row: Row, where: str) -> str:
    rewarded = row.get("reward_model")
    holders = [(rewarded, ("ground_truth",))] if isinstance(rewarded, dict) else []
    for holder, keys in (*holders, *((row, (key,)) for key in _ANSWER_KEYS)):
        key, value = _field(holder, keys, where)
        text = "" if value is None else _answer_text(value, key, where)
        if text:
            problem = unusable_gold(text)
            if problem:
                raise PairError(f"{where}: `{key}` {problem}. Give the final answer alone, or leave the row out.")
            return text
    raise PairError(f"{where}: no answer. Expected one of the keys {', '.join(_ANSWER_KEYS)}, as text or number.")


def _answer_text(value: Any, key: str, where: str) -> str:
    """The final answer; a list, as OlympiadBench's final_answer, holds answers that are all asked for."""
    if isinstance(value, list):
        if not value or not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value):
            raise PairError(f"{where}: `{key}` must be a text, a number, or a list of these.")
        return ", ".join(filter(None, (_answer_text(item, key, where) for item in value)))
    text = answer_field({key: value}, key, where).strip()
    before, separator, final = text.rpartition("####")  # GSM8K: the solution, then the answer
    return final.strip() if separator and before.strip() else text
