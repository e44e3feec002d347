"""Prompts as conversations: whatever shapes a prompt is used whole or refused by its name."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from spot_megatron.errors import PairError
from spot_megatron.files import Row, kind

COLUMNS = ("system", "history", "tools")  # beside a question or prompt; used
_REFUSED = ("images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs")


def prompt_columns(row: Row, source: str) -> tuple[list[Row], list[Row] | None]:
    """(turns before the question, tools) from the columns `system`, `history` and `tools`.

    `history` holds [user, assistant] pairs; `tools` function schemas, as a list or as JSON text. Raises PairError for
    one that is not so, and for columns that would shape the prompt but cannot be sent.
    """
    for key in _REFUSED:
        if row.get(key):
            raise PairError(
                f"{source}: `{key}` would be part of the prompt, and is not supported; remove the row, or the column "
                "if the question does not need it"
            )
    turns: list[Row] = []
    system, history, tools = (row.get(key) or None for key in COLUMNS)
    if system is not None:
        if not isinstance(system, str):
            raise PairError(f"{source}: `system` is {kind(system)}; it must be a string")
        turns.append({"role": "system", "content": system})
    for pair in history if isinstance(history, list) else [] if history is None else [None]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise PairError(f"{source}: `history` must be a list of [user, assistant] pairs of strings")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            tools = [None]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise PairError(f"{source}: `tools` must be a list of function schemas (objects), or such a list as JSON text")
    return turns, tools or None


def read_messages(asked: Any, source: str) -> list[Row]:
    """A conversation, unchanged. Raises PairError unless every turn has a role and a text, and the last is not a reply.

    A text may be one part of type "text"; a turn with tool calls may have none. Servers join several parts in different
    ways, so the trained prompt would not be the served one.
    """
    if not isinstance(asked, list) or not asked:
        raise PairError(
            f"{source}: the prompt must be text, or messages of which the last is a user's turn or a tool's result"
        )
    for number, turn in enumerate(asked):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise PairError(f'{source}: message {number} of the prompt must be an object with "role" and "content"')
        content = turn.get("content")
        texts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        bad = next((part for part in texts if not _is_text_part(part)), None)
        if bad is not None or (content is None and not turn.get("tool_calls")):
            found = f"a part of type {bad.get('type')!r}" if isinstance(bad, dict) and "type" in bad else kind(content)
            raise PairError(f"{source}: the content of message {number} holds {found}; only text can be sent")
        if len(texts) != 1:
            raise PairError(f"{source}: the content of message {number} holds {len(texts)} parts; write it as one text")
    if asked[-1]["role"] not in ("user", "tool"):
        raise PairError(
            f"{source}: the last message is by {asked[-1]['role']!r}; its last is a user's turn or a tool's"
        )
    return asked


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def whole_prompt(row: Row, asked: Any, source: str) -> tuple[list[Row], list[Row] | None]:
    """(all messages, tools) of a row whose question or prompt is `asked`. Raises PairError as the two readers."""
    turns, tools = prompt_columns(row, source)
    if isinstance(asked, str):
        return [*turns, {"role": "user", "content": asked}], tools
    messages = read_messages(asked, source)
    roles = {turn["role"] for turn in messages}
    if turns and (row.get("history") or roles & {"system", "developer"}):
        name = "history" if row.get("history") else "system"
        raise PairError(f"{source}: both the messages and the column `{name}` hold earlier turns; keep one of the two")
    return [*turns, *messages], tools


def read_prompt(row: Row, source: str) -> None:
    """Replace a row's `prompt`, `system` and `history` by one `prompt` of messages, and check `tools`.

    A row without any of them keeps its question as its prompt. Raises PairError as `whole_prompt`.
    """
    asked = row.get("prompt", row.get("question"))
    if isinstance(row.get("prompt"), list) or any(row.get(key) for key in COLUMNS):
        messages, tools = whole_prompt(row, asked, source)
        for key in COLUMNS:
            row.pop(key, None)
        row |= {"prompt": messages, **({"tools": tools} if tools else {})}
    else:
        prompt_columns(row, source)
        if not isinstance(asked, str):
            raise PairError(f"{source}: `prompt` is {kind(asked)}; it must be a string or messages")


def text_of(turn: Row) -> str:
    """A turn's text, its parts joined; tool calls follow as JSON."""
    content = turn.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    if turn.get("tool_calls"):
        text += ("\n" if text else "") + json.dumps(turn["tool_calls"], ensure_ascii=False)
    return text


def is_plain(messages: Sequence[Row], tools: Sequence[Row] | None) -> bool:
    """Whether the prompt is one user turn and nothing else."""
    return (
        len(messages) == 1 and not tools and messages[0].keys() <= {"role", "content"} and messages[0]["role"] == "user"
    )


def transcript(messages: Sequence[Row], tools: Sequence[Row] | None = None) -> str:
    """All of a prompt as text: a plain one as its question, another turn by turn with roles, tools first."""
    if is_plain(messages, tools):
        return text_of(messages[0])
    parts = [f"[tools]\n{json.dumps(tools, ensure_ascii=False)}"] if tools else []
    for turn in messages:
        name = turn.get("name")
        parts.append(f"[{turn['role']}{f' {name}' if name else ''}]\n{text_of(turn)}")
    return "\n\n".join(parts)


def shown_problem(row: Row) -> str:
    """The problem as shown to an oracle or a person: the question, or every turn of a longer prompt."""
    messages = row.get("prompt")
    if not isinstance(messages, list) or is_plain(messages, row.get("tools")):
        return str(row["question"])
    return transcript(messages, row.get("tools"))


def prompt_hash(messages: Sequence[Row], tools: Sequence[Row] | None) -> str:
    """16 hexadecimal digits of the whole prompt; of a plain one, of its text."""
    plain = is_plain(messages, tools)
    content = text_of(messages[0]) if plain else json.dumps([list(messages), tools], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
