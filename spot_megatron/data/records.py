"""Preference pairs in text (Pair) or token ids (TokenPair), and the readers of the pair files' formats.

spot            {"id", "prompt", "chosen", "rejected"} and optionally "chosen_finish", "rejected_finish", "meta",
                "chosen_ids", "rejected_ids"; the prompt is a text or a list of messages
token_ids       {"id", "prompt_ids", "chosen_ids", "rejected_ids"}
trl             TRL's preference data: prompt, chosen and rejected as texts or messages, or chosen and rejected as
                whole conversations; other keys are kept in meta, unless they look like a misspelt key of spot
visual_ai_spot  question, gemini_corrected_answer (chosen) and original_answer (rejected) of github.com/Visual-AI/SPoT
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spot_megatron.data.fields import Fields, read_fields
from spot_megatron.errors import PairError

Format = Literal["auto", "spot", "trl", "visual_ai_spot", "token_ids"]
Message = dict[str, Any]

FINISHES = ("stop", "length")
ROLES = ("system", "developer", "user", "assistant", "tool")
SPOT_KEYS = (
    "id", "prompt", "chosen", "rejected", "chosen_finish", "rejected_finish", "meta", "chosen_ids", "rejected_ids"
)  # fmt: skip
TOKEN_ID_KEYS = ("id", "prompt_ids", "chosen_ids", "rejected_ids")
TRL_UNREAD = ("tools", "chat_template_kwargs", "images")  # they would change the prompt
CORRECTION_MARKERS = ("=== CORRECTED STARTED ===", "=== CORRECTED ENDED ===")


@dataclass(frozen=True, eq=False)
class Pair:
    """One preference pair in text."""

    id: str
    prompt: str | list[Message]  # a text is one user message
    chosen: str
    rejected: str
    chosen_finish: str = "stop"  # "stop": the response ended by itself; "length": it was cut and gets no end token
    rejected_finish: str = "stop"
    meta: dict[str, Any] = field(default_factory=dict)
    chosen_ids: list[int] | None = None  # sampled ids, end token included: used instead of tokenising the text again
    rejected_ids: list[int] | None = None
    tools: list[Message] | None = None  # JSON schemas of functions, for the chat template
    source: str = ""  # "file:line"

    needs_tokenizer = True


@dataclass(frozen=True, eq=False)
class TokenPair:
    """One preference pair in token ids; a response holds its end token, unless it was cut by length."""

    id: str
    prompt_ids: np.ndarray  # [prompt tokens] int32
    chosen_ids: np.ndarray  # [chosen tokens] int32
    rejected_ids: np.ndarray  # [rejected tokens] int32
    source: str = ""  # "file:line"

    needs_tokenizer = False


def read_pairs(paths: Sequence[Path], format: Format = "auto") -> list[Pair | TokenPair]:
    """All pairs of the files, in order. "auto" takes the format of the first line for all of them.

    A pair without an id (trl, visual_ai_spot) is called line-N, or FILE:line-N where there are several files. Raises
    PairError for the first mistake, naming file, line, key and remedy; no line is ever skipped.
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
                        f"cannot tell the format from the keys {sorted(row.values)}; see the README's formats"
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
    del default_id  # this format has ids
    row.require(*TOKEN_ID_KEYS)
    row.allow_only(TOKEN_ID_KEYS)
    prompt, chosen, rejected = (np.array(row.token_ids(key), dtype=np.int32) for key in TOKEN_ID_KEYS[1:])
    if np.array_equal(chosen, rejected):
        raise _same_sides(row)
    return TokenPair(_own_id(row), prompt, chosen, rejected, row.source)


def _read_spot(row: Fields, default_id: str) -> Pair:
    del default_id  # this format has ids
    row.require("id", "prompt", "chosen", "rejected")
    row.allow_only(SPOT_KEYS)
    return _pair(row, _own_id(row), _prompt(row), row.text("chosen"), row.text("rejected"), row.mapping("meta"))


def _read_trl(row: Fields, default_id: str) -> Pair:
    row.require("chosen", "rejected")
    for key in TRL_UNREAD:
        if row.values.get(key):
            raise row.error(f'"{key}" would change the prompt and is not supported; put its effect into the messages')
    _refuse_near_misses(row)
    meta = row.mapping("meta") | {key: value for key, value in row.values.items() if key not in SPOT_KEYS}
    kinds = {type(row.values["chosen"]), type(row.values["rejected"])}
    if kinds == {list}:
        (context, chosen), (other_context, rejected) = _conversation(row, "chosen"), _conversation(row, "rejected")
        if context != other_context:
            raise row.error('"chosen" and "rejected" differ before their last message; only the last may differ')
        prompt = _trl_prompt(row, context)
    else:
        if "prompt" not in row.values:
            raise row.error(
                '"prompt" is missing, and it cannot be told from texts where it ends; add it, or use messages'
            )
        prompt, chosen, rejected = _prompt(row), row.text("chosen"), row.text("rejected")
    return _pair(row, row.name("id") or default_id, prompt, chosen, rejected, meta)


def _refuse_near_misses(row: Fields) -> None:
    """TRL's data may have columns of its own; one that is nearly a known key is taken for a slip.

    After "chosen_" and "rejected_" only the rest is compared, which tells chosen_finsh from chosen_rating. The limits
    let pass what public data sets have: prompt_id, score_chosen, chosen_rating, chosen_model.
    """
    for key in row.values:
        if key in SPOT_KEYS:
            continue
        side, _, rest = key.lower().partition("_")
        if side in ("chosen", "rejected"):
            near = [f"{side}_{name}" for name in difflib.get_close_matches(rest, ("finish", "ids"), n=1)]
        else:
            near = difflib.get_close_matches(key.lower(), SPOT_KEYS, n=1, cutoff=0.81)
        if near:
            raise row.error(
                f'unknown key "{key}"; did you mean "{near[0]}"? If it is something else, move it into "meta"'
            )


def _read_visual_ai_spot(row: Fields, default_id: str) -> Pair:
    """Blank lines before an answer are left out, as the reference's chat template does; so are the oracle's markers."""
    question = "question" if "question" in row.values else "prompt"
    row.require(question, "gemini_corrected_answer", "original_answer")
    used = (question, "gemini_corrected_answer", "original_answer")
    meta = {key: value for key, value in row.values.items() if key not in used}
    chosen = row.text("gemini_corrected_answer")
    start, end = CORRECTION_MARKERS
    if start in chosen or end in chosen:
        _, started, chosen = chosen.partition(start)
        chosen, ended, _ = chosen.partition(end)
        if not started or not ended or not chosen.strip():
            raise row.error(
                f'"gemini_corrected_answer" has no whole text between "{start}" and "{end}"; remove the line'
            )
        chosen = chosen.strip()
    rejected = row.text("original_answer").lstrip("\n")
    return _pair(row, row.name("id", "index") or default_id, row.text(question), chosen.lstrip("\n"), rejected, meta)


_READERS: dict[str, Callable[[Fields, str], Pair | TokenPair]] = {
    "spot": _read_spot,
    "token_ids": _read_token_ids,
    "trl": _read_trl,
    "visual_ai_spot": _read_visual_ai_spot,
}


def _pair(row: Fields, id: str, prompt: str | list[Message], chosen: str, rejected: str, meta: dict[str, Any]) -> Pair:
    """Adds what every text format may say about its responses."""

    def sampled_ids(key: str) -> list[int] | None:
        return row.token_ids(key) if row.values.get(key) is not None else None

    pair = Pair(
        id=id,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_finish=row.choice("chosen_finish", FINISHES),
        rejected_finish=row.choice("rejected_finish", FINISHES),
        meta=meta,
        chosen_ids=sampled_ids("chosen_ids"),
        rejected_ids=sampled_ids("rejected_ids"),
        source=row.source,
    )
    if (chosen, pair.chosen_finish, pair.chosen_ids) == (rejected, pair.rejected_finish, pair.rejected_ids):
        raise _same_sides(row)
    return pair


def _own_id(row: Fields) -> str:
    name = row.name("id")
    if name is None:
        raise row.error('"id" is empty; every pair needs an id of its own')
    return name


def _same_sides(row: Fields) -> PairError:
    return row.error(
        "the chosen and the rejected response are the same, so there is nothing to prefer; remove the line"
    )


def _prompt(row: Fields) -> str | list[Message]:
    prompt = row.values["prompt"]
    return _messages(row, "prompt", prompt) if isinstance(prompt, list) else row.text("prompt")


def _messages(row: Fields, key: str, messages: list[Any]) -> list[Message]:
    """Checked messages of a prompt, unchanged; the model answers the last one."""
    if not messages:
        raise row.error(f'"{key}" is empty; fill it in or remove the line')
    for number, message in enumerate(messages):
        place = f'message {number} of "{key}"'
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise row.error(f'{place} must be an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise row.error(f"{place}: role {message['role']!r} is none of {', '.join(ROLES)}")
        may_be_null = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(message["content"], str) and not (message["content"] is None and may_be_null):
            raise row.error(f"{place}: content must be a string; images and lists of parts are not supported")
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise row.error(f'the last message of "{key}" is by {last["role"]}; the model answers a user or a tool message')
    if not last["content"].strip():
        raise row.error(f'the last message of "{key}" is empty; fill it in or remove the line')
    return messages


def _conversation(row: Fields, key: str) -> tuple[list[Any], str]:
    """(messages before the last, text of the last one), which is the response."""
    messages = row.values[key]
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise row.error(f'"{key}" must end with an assistant message that has a text as its content')
    if not last["content"].strip():
        raise row.error(f'"{key}" is empty; fill it in or remove the line')
    extra = [name for name, value in last.items() if name not in ("role", "content") and value]
    if extra:
        raise row.error(f'the response in "{key}" has "{extra[0]}" besides its content, which would be lost')
    return messages[:-1], last["content"]


def _trl_prompt(row: Fields, context: list[Any]) -> str | list[Message]:
    """The prompt of a row whose responses are messages: its own key, or what the conversations start with."""
    if "prompt" not in row.values:
        if not context:
            raise row.error('"prompt" is missing, and "chosen" holds no message before the response; add the prompt')
        return _messages(row, "chosen", context)
    prompt = _prompt(row)
    as_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if context and context != as_messages:
        raise row.error('"prompt" differs from the messages before the response in "chosen"; keep one of the two')
    return prompt
