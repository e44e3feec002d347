"""The prompt of a row: its own key and the columns that belong to it, used whole or refused by name.

Used: `system` becomes the system message, `history` the turns before the prompt, `tools` goes to the chat template.
Refused: every other column that would shape the prompt, and a column whose name is nearly one of these.
"""

import difflib
import json
from collections.abc import Collection
from typing import Any

from spot_megatron.data.fields import Fields
from spot_megatron.errors import PairError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ROLES[:2]
USED_COLUMNS = ("system", "history", "tools")
REFUSED_COLUMNS = (
    "system_prompt", "system_message", "conversation_history", "chat_history", "context", "input",
    "documents", "functions", "image", "images", "video", "videos", "audio", "audios", "chat_template",
    "chat_template_kwargs", "enable_thinking", "continue_final_message",
)  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})  # a column without a value; false and 0 are values


def check_columns(row: Fields, known: Collection[str]) -> None:
    """Raises PairError for a column that would shape the prompt and is not used, or whose name is a near miss.

    Columns other than `known` are carried in meta. A near miss of a known key counts as a typing error: after "chosen_"
    and "rejected_" only the rest is compared, which distinguishes chosen_finsh from chosen_rating. The cutoffs accept
    the columns of public data sets: prompt_id, score_chosen, chosen_rating, chosen_model.
    """
    for key, value in row.values.items():
        if key in known or (key in REFUSED_COLUMNS and value in EMPTY):
            continue
        if key in REFUSED_COLUMNS:
            raise row.error(
                f'"{key}" would change the prompt and is not supported; write its content into the messages of '
                '"prompt", or move it into "meta" if it does not belong to the prompt'
            )
        near = _near_miss(key.lower(), known)
        if near:
            raise row.error(f'unknown key "{key}"; did you mean "{near}"? If it is something else, move it into "meta"')


def _near_miss(key: str, known: Collection[str]) -> str | None:
    side, _, rest = key.partition("_")
    if side in ("chosen", "rejected"):
        suffixes = [name.removeprefix("chosen_") for name in known if name.startswith("chosen_")]
        near = difflib.get_close_matches(rest, suffixes, n=1)
        return f"{side}_{near[0]}" if near else None
    names = [*known, *(name for name in (*USED_COLUMNS, *REFUSED_COLUMNS) if name not in known)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.81)
    return near[0] if near else None


def read_prompt(row: Fields) -> str | list[Message]:
    """The row's `prompt`, with `system` and `history` where it has them."""
    prompt = row.values["prompt"]
    return whole_prompt(row, read_messages(row, "prompt", prompt) if isinstance(prompt, list) else row.text("prompt"))


def whole_prompt(row: Fields, prompt: str | list[Message]) -> str | list[Message]:
    """`prompt` behind the row's `system` message and `history`; unchanged if the row has neither."""
    system, history = row.values.get("system"), row.values.get("history")
    if system in EMPTY and history in EMPTY:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own_system = [message for message in messages[:1] if message["role"] in SYSTEM_ROLES]
    messages = messages[len(own_system) :]
    if system not in EMPTY:
        if own_system and own_system[0]["content"] != system:
            raise row.error('"system" differs from the system message of "prompt"; keep one of the two')
        own_system = own_system or [{"role": "system", "content": row.text("system")}]
    return read_messages(row, "prompt", [*own_system, *([] if history in EMPTY else _history(row)), *messages])


def read_tools(row: Fields) -> list[Message] | None:
    """The row's `tools`: a list of JSON schemas, or the same as a JSON string, as TRL stores it."""
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise row.error(f'"tools" is a string that is not JSON ({error}); give a list of JSON schemas') from None
    if tools in EMPTY:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row.error('"tools" must be a list of JSON schemas')
    return tools


def read_messages(row: Fields, key: str, messages: list[Any]) -> list[Message]:
    """Checked messages of a prompt; the model answers the last one. A content of one text part becomes its text."""
    if not messages:
        raise row.error(f'"{key}" is empty; fill it in or remove the line')
    messages = [_with_plain_content(message) for message in messages]
    for number, message in enumerate(messages):
        _check_message(row, f'message {number} of "{key}"', message)
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise row.error(f'the last message of "{key}" is by {last["role"]}; the model answers a user or a tool message')
    if not last["content"].strip():
        raise row.error(f'the last message of "{key}" is empty; fill it in or remove the line')
    return messages


def read_conversation(row: Fields, key: str) -> tuple[list[Any], str]:
    """(messages before the last, text of the last one), which is the response."""
    messages = row.values[key]
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise row.error(f'"{key}" must end with an assistant message that has a string as its content')
    if not last["content"].strip():
        raise row.error(f'"{key}" is empty; fill it in or remove the line')
    extra = [name for name, value in last.items() if name not in ("role", "content") and value]
    if extra:
        raise row.error(f'the response in "{key}" has "{extra[0]}" besides its content, which would be lost')
    return messages[:-1], last["content"]


def prompt_of_conversation(row: Fields, context: list[Any]) -> str | list[Message]:
    """The prompt of a row whose responses are messages: its own key, or what the conversations start with."""
    if row.values.get("prompt") is None:
        if not context:
            raise row.error('"prompt" is missing, and "chosen" holds no message before the response; add the prompt')
        return whole_prompt(row, read_messages(row, "chosen", context))
    prompt = row.values["prompt"]
    prompt = read_messages(row, "prompt", prompt) if isinstance(prompt, list) else row.text("prompt")
    as_messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if context and context != as_messages:
        raise row.error('"prompt" differs from the messages before the response in "chosen"; keep one of the two')
    return whole_prompt(row, prompt)


def _with_plain_content(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    part = content[0] if isinstance(content, list) and len(content) == 1 else None
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {**message, "content": part["text"]}
    return message


def _check_message(row: Fields, place: str, message: Any) -> None:
    if not isinstance(message, dict) or "role" not in message:
        raise row.error(f'{place} must be an object with "role" and "content"')
    if message["role"] not in ROLES:
        raise row.error(f"{place}: role {message['role']!r} must be one of {', '.join(ROLES)}")
    may_be_null = message["role"] == "assistant" and message.get("tool_calls")
    content = message.get("content")
    if content is None and not may_be_null:
        raise row.error(f'{place} must be an object with "role" and "content"')
    if not isinstance(content, str | None):
        raise row.error(
            f"{place}: content must be a string, or a list of one text part; images and several parts are not supported"
        )


def _history(row: Fields) -> list[Message]:
    """The turns of `history`: [question, answer] pairs of strings, or messages."""
    history = row.values["history"]
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return history
    messages: list[Message] = []
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(side, str) for side in turn):
            raise _wrong_history(row)
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _wrong_history(row: Fields) -> PairError:
    return row.error('"history" must be a list of [question, answer] pairs of strings, or a list of messages')
