"""The one reader of chat completion bodies: every shape that servers send becomes a Reply, or a BadReply."""

import json
import re
from dataclasses import dataclass
from typing import Any

# Servers' names for the two finish reasons that a pair may hold (files.FINISH_REASONS) and for a filtered answer.
CONTENT_FILTER = "content_filter"
_FINISH_REASONS = {
    "stop": ("stop", "eos", "eos_token", "end_turn", "stop_sequence"),
    "length": ("length", "max_tokens", "max_output_tokens", "model_length"),
    CONTENT_FILTER: ("content_filter", "safety", "prohibited_content", "recitation"),
}
_FINISH = {name: ours for ours, names in _FINISH_REASONS.items() for name in names}

_ERROR_STATUS = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "model_not_found": 404,
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
}
# Fields of a message that hold thinking (vLLM, SGLang, OpenRouter, Ollama), and the tags of thinking inside a content
# (Qwen3 and DeepSeek-R1, prompted models, Mistral, gpt-oss).
_THOUGHTS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_THINKING_TAG = re.compile(r"</?think(?:ing)?>|\[/?THINK\]|<\|channel\|>analysis")
_OUT_OF_CREDIT = {"insufficient_quota", "insufficient_balance", "billing_hard_limit_reached", "billing_not_active"}


class BadReply(Exception):
    """A body that is not a completion. `status` is the HTTP status that an `error` in the body stands for, or None."""

    def __init__(self, reason: str, detail: str, error: "ServerError | None" = None) -> None:
        super().__init__(detail)
        self.reason, self.error = reason, error


@dataclass(frozen=True)
class ServerError:
    """The `error` object of a body: the server's words with its code, and the HTTP status that it means."""

    words: str
    status: int
    out_of_credit: bool


@dataclass(frozen=True)
class Reply:
    """One sampled answer. `text` is "" where the content is null; token counts are None where they are not reported.

    `completion_tokens` include hidden thinking: the larger of the reported count and total - prompt.
    """

    text: str
    reasoning: str
    finish_reason: str
    token_ids: list[int] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    num_hidden: int  # thinking tokens that the server counts, though it may not show them

    @property
    def is_empty(self) -> bool:
        return not self.text.strip()

    @property
    def has_thinking(self) -> bool:
        """Whether the model thought: in a field of its own, between tags inside the content, or hidden."""
        return bool(self.reasoning.strip() or self.num_hidden or _THINKING_TAG.search(self.text))


def read_reply(payload: bytes) -> Reply:
    """The first choice of a response body. Raises BadReply for anything that is not a completion."""
    try:
        body = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadReply("bad_body", f"a response that is not JSON ({error})") from None
    body = body if isinstance(body, dict) else {}
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if (reported := server_error(body) or server_error(choice)) is not None:
        raise BadReply(f"http_{reported.status}", reported.words, reported)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise BadReply("empty_choices", "a response without choices[0].message")
    text, reasoning = _texts(message)
    for part in (text, reasoning):
        _check_unicode(part)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, completion, total = (_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
    if total is not None and prompt is not None:
        completion = max(completion or 0, total - prompt)
    details = usage.get("completion_tokens_details")
    hidden = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    finish = str(choice.get("finish_reason") or "unknown").lower()
    finish = "tool_calls" if message.get("tool_calls") else _FINISH.get(finish, finish)  # Ollama writes stop
    return Reply(text, reasoning, finish, _token_ids(choice), prompt, completion, hidden or 0)


def server_error(body: object) -> ServerError | None:
    """The error that a body reports (OpenAI's, OpenRouter's and vLLM's shapes), or None."""
    if not isinstance(body, dict):
        return None
    error = body if body.get("object") == "error" else body.get("error")
    if not error:
        return None
    error = error if isinstance(error, dict) else {"message": str(error)}
    names = [str(error[key]) for key in ("code", "type") if error.get(key) is not None]
    words = f"{error.get('message') or 'no message'}" + (f" ({', '.join(names)})" if names else "")
    numbers = [int(name) for name in names if name.isdecimal() and 400 <= int(name) < 600]
    known = [_ERROR_STATUS[name.lower()] for name in names if name.lower() in _ERROR_STATUS]
    status = (numbers or known or [500])[0]
    out_of_credit = status == 402 or any(name.lower() in _OUT_OF_CREDIT for name in names)
    return ServerError(words[:500], 402 if out_of_credit else status, out_of_credit)


def _texts(message: dict[str, Any]) -> tuple[str, str]:
    """(content, reasoning) of a message whose content is text, null, or a list of parts."""
    content = message.get("content")
    text: list[str] = []
    thoughts = [str(message[key]) for key in _THOUGHTS if message.get(key)]
    for part in content if isinstance(content, list) else [content]:
        if part is None:
            continue
        if isinstance(part, str):
            text.append(part)
            continue
        kind, said = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind in ("text", "output_text") and isinstance(said, str):
            text.append(said)
        elif kind in ("thinking", "reasoning", "redacted_thinking"):
            thoughts.append(str(part.get("thinking") or said or "hidden"))
        elif kind != "refusal":
            raise BadReply("bad_body", "a message whose content is neither text nor a list of text parts")
    return "".join(text), "\n".join(thoughts)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: JSON can spell them, no file and no tokenizer can hold them
        raise BadReply("bad_body", "a message that is not Unicode text") from None


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """vLLM (>= 0.10.2) and SGLang (2026-07 on) return `token_ids` in the choice when asked by `return_token_ids`."""
    ids = choice.get("token_ids")
    return ids if isinstance(ids, list) and ids and all(type(item) is int for item in ids) else None


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
