"""Preference pairs in text (Pair) or token ids (TokenPair), and the readers of the pair files' formats.

spot            {"id", "prompt", "chosen", "rejected"} and optionally "chosen_finish", "rejected_finish", "meta",
                "chosen_ids", "rejected_ids"; the prompt is a string or a list of messages
token_ids       {"id", "prompt_ids", "chosen_ids", "rejected_ids"}
trl             TRL's preference data: prompt, chosen and rejected as strings or messages, or chosen and rejected as
                whole conversations
visual_ai_spot  question, gemini_corrected_answer (chosen) and original_answer (rejected) of github.com/Visual-AI/SPoT

In every format columns that belong to the prompt are used or refused (prompts.py), other columns are kept in meta, and
a pair without an id is named by its line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spot_megatron.data.fields import Fields, read_fields
from spot_megatron.data.prompts import (
    EMPTY,
    USED_COLUMNS,
    Message,
    check_columns,
    prompt_of_conversation,
    read_conversation,
    read_prompt,
    read_tools,
    whole_prompt,
)
from spot_megatron.errors import PairError
from spot_megatron.files import FINISH_REASONS

Format = Literal["auto", "spot", "trl", "visual_ai_spot", "token_ids"]
TEXTS = ("prompt", "chosen", "rejected")
OPTIONAL_COLUMNS = (
    "id", "chosen_finish", "rejected_finish", "meta", "chosen_ids", "rejected_ids", *USED_COLUMNS
)  # fmt: skip
TEXT_KEYS = (*TEXTS, *OPTIONAL_COLUMNS)
VISUAL_ANSWERS = ("gemini_corrected_answer", "original_answer")
TOKEN_ID_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
CORRECTION_MARKERS = ("=== CORRECTED STARTED ===", "=== CORRECTED ENDED ===")


@dataclass(frozen=True, eq=False)
class Pair:
    """One preference pair in text."""

    id: str
    prompt: str | list[Message]  # a string is one user message
    chosen: str
    rejected: str
    chosen_finish: str = "stop"  # "stop": ended by the model; "length": cut, so it gets no end token
    rejected_finish: str = "stop"
    meta: dict[str, Any] = field(default_factory=dict)
    chosen_ids: list[int] | None = None  # sampled ids with their end token, used instead of tokenising the text
    rejected_ids: list[int] | None = None
    tools: list[Message] | None = None  # JSON schemas of functions, for the chat template
    source: str = ""  # "file:line"

    needs_tokenizer = True

    @property
    def has_one_side(self) -> bool:
        """A text of a probe: `chosen` alone."""
        return self.rejected_ids == []


@dataclass(frozen=True, eq=False)
class TokenPair:
    """One preference pair in token ids; a response includes its end token, unless it was cut by length."""

    id: str
    prompt_ids: np.ndarray  # [prompt tokens] int32
    chosen_ids: np.ndarray  # [chosen tokens] int32
    rejected_ids: np.ndarray  # [rejected tokens] int32
    source: str = ""  # "file:line"
    meta: dict[str, Any] = field(default_factory=dict)

    needs_tokenizer = False

    @property
    def has_one_side(self) -> bool:
        """A text of a probe: `chosen_ids` alone."""
        return len(self.rejected_ids) == 0


def read_pairs(paths: Sequence[Path], format: Format = "auto") -> list[Pair | TokenPair]:
    """All pairs of the files, in order. "auto" takes the format of the first line for all of them.

    Files are JSONL, plain or packed (gzip, bzip2, xz, Zstandard), or Parquet. A pair without an id is named line-N, or
    FILE:line-N if there are several files.

    Raises:
        PairError: the first mistake, with file, line, key and remedy; no line is ever skipped.
    """
    if not paths:
        raise PairError("data.pairs names no file")
    records: list[Pair | TokenPair] = []
    sources: dict[str, str] = {}
    expected: Format = format
    for path in map(Path, paths):
        for row in read_fields(path):
            looks = _looks_like(row)
            if expected == "auto":
                if looks is None:
                    raise row.error(
                        f"cannot tell the format from the keys {sorted(row.values)}; use prompt, chosen and rejected"
                    )
                expected = looks
            elif looks not in (None, expected) and {looks, expected} != {"spot", "trl"}:
                other = f"data.format is {format}" if format != "auto" else f"{records[0].source} is {expected}"
                raise row.error(f"looks like format {looks}, but {other}; all lines of a run must have one format")
            default_id = f"line-{row.line}" if len(paths) == 1 else f"{path.name}:line-{row.line}"
            record = _READERS[expected](row, default_id)
            if record.id in sources:
                raise row.error(f'id "{record.id}" was already used at {sources[record.id]}; ids must be unique')
            sources[record.id] = row.source
            records.append(record)
    return records


def read_probe(path: Path) -> list[Pair | TokenPair]:
    """The texts of a probe, as pairs without a rejected side, in order.

    A line is {"prompt", "response"} and optionally "id", "system", "history", "tools" and "response_finish", as in a
    pair file, or {"prompt_ids", "response_ids"}.

    Raises:
        PairError: the first mistake, with file, line, key and remedy.
    """
    known = ("id", "prompt", "response", "response_finish", "meta", *USED_COLUMNS)
    records: list[Pair | TokenPair] = []
    for row in read_fields(path):
        id = _id(row, f"line-{row.line}")
        if "prompt_ids" in row.values:
            row.require("prompt_ids", "response_ids")
            check_columns(row, ("id", "prompt_ids", "response_ids", "meta"))
            prompt, response = (np.array(row.token_ids(key), dtype=np.int32) for key in ("prompt_ids", "response_ids"))
            records.append(TokenPair(id, prompt, response, np.zeros(0, dtype=np.int32), row.source))
        else:
            row.require("prompt", "response")
            check_columns(row, known)
            finish = row.choice("response_finish", FINISH_REASONS)
            text = Pair(id, read_prompt(row), row.text("response"), "", finish, rejected_ids=[], tools=read_tools(row),
                        source=row.source)  # fmt: skip
            records.append(text)
    return records


def _looks_like(row: Fields) -> Format | None:
    values = row.values
    if "prompt_ids" in values:
        return "token_ids"
    if "gemini_corrected_answer" in values or "original_answer" in values:
        return "visual_ai_spot"
    if "chosen" in values and "rejected" in values:
        return "spot" if "id" in values and isinstance(values["chosen"], str) else "trl"
    return None


def _read_token_ids(row: Fields, default_id: str) -> TokenPair:
    row.require(*TOKEN_ID_KEYS)
    for key in row.values:
        if key in TEXTS or (key in USED_COLUMNS and row.values[key] not in EMPTY):
            raise row.error(f'unknown key "{key}" beside token ids, which hold the whole text; move it into "meta"')
    known = ("id", "meta", *TOKEN_ID_KEYS, *USED_COLUMNS)
    check_columns(row, known)
    prompt, chosen, rejected = (np.array(row.token_ids(key), dtype=np.int32) for key in TOKEN_ID_KEYS)
    if np.array_equal(chosen, rejected):
        raise _same_sides(row)
    return TokenPair(_id(row, default_id), prompt, chosen, rejected, row.source, _meta(row, known))


def _read_spot(row: Fields, default_id: str) -> Pair:
    row.require(*TEXTS)
    check_columns(row, TEXT_KEYS)
    return _pair(row, _id(row, default_id), read_prompt(row), row.text("chosen"), row.text("rejected"))


def _read_trl(row: Fields, default_id: str) -> Pair:
    row.require("chosen", "rejected")
    check_columns(row, TEXT_KEYS)
    kinds = {type(row.values["chosen"]), type(row.values["rejected"])}
    prompt: str | list[Message]
    if kinds == {list}:
        (context, chosen), (other, rejected) = read_conversation(row, "chosen"), read_conversation(row, "rejected")
        if context != other:
            raise row.error('"chosen" and "rejected" differ before their last message; only the last may differ')
        prompt = prompt_of_conversation(row, context)
    else:
        if row.values.get("prompt") is None:
            raise row.error(
                '"prompt" is missing, and its end cannot be found in strings; add it, or give chosen and rejected as '
                "messages"
            )
        prompt, chosen, rejected = read_prompt(row), row.text("chosen"), row.text("rejected")
    return _pair(row, _id(row, default_id), prompt, chosen, rejected)


def _read_visual_ai_spot(row: Fields, default_id: str) -> Pair:
    """Removes blank lines before an answer, as the reference's chat template does, and the oracle's markers."""
    question = "question" if "question" in row.values else "prompt"
    row.require(question, *VISUAL_ANSWERS)
    known = (question, *VISUAL_ANSWERS, *OPTIONAL_COLUMNS)
    check_columns(row, known)
    chosen = row.text("gemini_corrected_answer")
    start, end = CORRECTION_MARKERS
    if start in chosen or end in chosen:
        _, started, chosen = chosen.partition(start)
        chosen, ended, _ = chosen.partition(end)
        if not started or not ended or not chosen.strip():
            raise row.error(
                f'"gemini_corrected_answer" has no complete text between "{start}" and "{end}"; remove the line'
            )
        chosen = chosen.strip()
    rejected = row.text("original_answer").lstrip("\n")
    id = row.name("id", "index") or default_id
    return _pair(row, id, whole_prompt(row, row.text(question)), chosen.lstrip("\n"), rejected, known)


_READERS: dict[str, Callable[[Fields, str], Pair | TokenPair]] = {
    "spot": _read_spot,
    "token_ids": _read_token_ids,
    "trl": _read_trl,
    "visual_ai_spot": _read_visual_ai_spot,
}


def _pair(
    row: Fields,
    id: str,
    prompt: str | list[Message],
    chosen: str,
    rejected: str,
    known: tuple[str, ...] = TEXT_KEYS,
) -> Pair:
    """Adds the optional keys of every text format; columns other than `known` go into meta."""

    def sampled_ids(key: str) -> list[int] | None:
        return row.token_ids(key) if row.values.get(key) is not None else None

    pair = Pair(
        id=id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_finish=row.choice("chosen_finish", FINISH_REASONS),
        rejected_finish=row.choice("rejected_finish", FINISH_REASONS),
        meta=_meta(row, known),
        chosen_ids=sampled_ids("chosen_ids"),
        rejected_ids=sampled_ids("rejected_ids"),
        tools=read_tools(row),
        source=row.source,
    )
    if (chosen, pair.chosen_finish, pair.chosen_ids) == (rejected, pair.rejected_finish, pair.rejected_ids):
        raise _same_sides(row)
    return pair


def _id(row: Fields, default_id: str) -> str:
    name = row.name("id")
    if name is None and row.values.get("id") is not None:
        raise row.error('"id" is empty; give every pair an id of its own, or remove the key')
    return name or default_id


def _meta(row: Fields, known: tuple[str, ...]) -> dict[str, Any]:
    return row.mapping("meta") | {key: value for key, value in row.values.items() if key not in known}


def _same_sides(row: Fields) -> PairError:
    return row.error("the chosen and the rejected response are equal; remove the line")
