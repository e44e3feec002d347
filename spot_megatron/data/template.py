"""Preference pairs in text -> token ids: exactly the prompt that is served and the response that is sampled.

The prompt is the chat template's, with its generation prompt: what the server feeds the model before the first sampled
token, Qwen3's empty think block included. The response is what the model wrote after it, up to and including its end
token (end_tokens.py). Sampled ids are used where a record has them, because tokenising their text again may give
others. Nothing is truncated: a pair that cannot be trained on is dropped under a reason, and counted.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from spot_megatron.data.end_tokens import PROBE, EndTokens, find_end_tokens, read_json_object
from spot_megatron.data.records import Message, Pair, TokenPair
from spot_megatron.errors import PairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256  # texts tokenised in one call, which keeps all their offsets in memory

# Templates run in jinja's sandbox (transformers' own), where any of these may be raised on messages that a template was
# not written for, or by a template that does what the sandbox forbids.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)

CLOCK_CALL = re.compile(r"""\bstrftime_now\s*\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\)""")
CLOCK_TEST = re.compile(r"\bstrftime_now\s+is\s+(not\s+)?(un)?defined\b")


@dataclass(frozen=True)
class TokenizedPairs:
    """The pairs to train on, in order, and the ids of the dropped ones by reason.

    Reasons: too_long (prompt and longer response exceed the limit), identical_tokens (the responses have equal ids),
    end_token_inside (a response continues after an end token), no_end_token (sampled ids of a response that was not cut
    do not end with one), empty_response (no token).
    """

    pairs: list[TokenPair]
    dropped: dict[str, list[str]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; nothing is downloaded.

    Raises:
        PairError: it cannot be loaded, or pads with an id that the model has no embedding for.
    """
    from transformers import AutoTokenizer  # takes seconds, and pairs in token ids need no tokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise PairError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); copy the model's "
            "tokenizer.json (or tokenizer.model) and tokenizer_config.json into this folder, or use pairs of "
            "data.format token_ids"
        ) from error
    vocab_size = read_json_object(folder / "config.json").get("vocab_size")
    pad_id = tokenizer.pad_token_id
    if isinstance(vocab_size, int) and isinstance(pad_id, int) and pad_id >= vocab_size:
        reason = f"pad_token {tokenizer.pad_token} is token id {pad_id}, beyond the model's vocab_size of {vocab_size}"
        raise PairError(
            f'{folder}: {reason}; set "pad_token" in tokenizer_config.json to a token of the model, such as its end '
            "token"
        ) from ValueError(reason)
    return tokenizer


def tokenize_pairs(
    records: Sequence[Pair | TokenPair],
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
    enable_thinking: bool,
    now: datetime.datetime | None = None,
) -> TokenizedPairs:
    """Token ids of every record that can be trained on within `max_tokens` (prompt and longer response).

    Args:
        records: in text or token ids.
        tokenizer: of the model; may be None if all records are token ids.
        max_tokens: longer pairs are dropped.
        enable_thinking: passed to the chat template; templates without it ignore it, as they do in serving.
        now: the time that a chat template sees if it reads the clock. A run passes the same value on every rank and
            every resume, or its prompts change with the date. None: the time of this call.

    Raises:
        PairError: the tokenizer, or the template for one of the prompts, cannot be used.
    """
    now = now or datetime.datetime.now()
    texts = [record for record in records if isinstance(record, Pair)]
    if texts:
        _check_tokenizer(texts[0], tokenizer)
    ends = None if tokenizer is None else find_end_tokens(tokenizer, _rendered_turns(tokenizer, enable_thinking, now))
    tokenized = (
        _tokenize(texts, tokenizer, ends, enable_thinking, now) if tokenizer is not None and ends is not None else []
    )
    tokenized_texts = iter(tokenized)
    pairs: list[TokenPair] = []
    dropped: dict[str, list[str]] = {}
    for record in records:
        pair = next(tokenized_texts) if isinstance(record, Pair) else record
        reason = _drop_reason(pair, record, ends, max_tokens)
        if reason is None:
            pairs.append(pair)
        else:
            dropped.setdefault(reason, []).append(pair.id)
    return TokenizedPairs(pairs, dropped)


def check_vocabulary(pairs: Sequence[TokenPair], vocab_size: int, hint: str) -> None:
    """Raises PairError if a token id is not below `vocab_size`; `hint` names the source of that size."""
    for pair in pairs:
        largest = max(int(ids.max(initial=0)) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if largest >= vocab_size:
            raise PairError(
                f"{pair.source}: pair {pair.id} holds token id {largest}, which takes a vocabulary of {largest + 1}; "
                f"the model's has {vocab_size} ({hint}); tokenise the pairs with this model's tokenizer"
            )


def _check_tokenizer(first: Pair, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raises PairError if there is no tokenizer, or none with one chat template for all pairs in text."""
    if tokenizer is None:
        raise PairError(f"{first.source}: pairs in text need a tokenizer, or convert them to data.format token_ids")
    folder, template = tokenizer.name_or_path, tokenizer.chat_template
    if not template:
        raise PairError(
            f"{folder}: the tokenizer has no chat template, so the served prompt is unknown; copy the instruct model's "
            "chat_template.jinja into this folder, or use pairs of data.format token_ids"
        )
    if isinstance(template, dict) and "default" not in template:
        raise PairError(
            f"{folder}: the tokenizer has the chat templates {', '.join(sorted(template))}, but none is named default; "
            "save the one that is served as chat_template.jinja in this folder"
        )


def _tokenize(
    pairs: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    enable_thinking: bool,
    now: datetime.datetime,
) -> list[TokenPair]:
    prompts = _encode([_render_prompt(pair, tokenizer, enable_thinking, now) for pair in pairs], tokenizer)
    chosen = _response_ids([(pair.chosen, pair.chosen_ids, pair.chosen_finish) for pair in pairs], tokenizer, ends)
    rejected = _response_ids(
        [(pair.rejected, pair.rejected_ids, pair.rejected_finish) for pair in pairs], tokenizer, ends
    )
    return [
        TokenPair(pair.id, _int32(prompt), _int32(side), _int32(other), pair.source)
        for pair, prompt, side, other in zip(pairs, prompts, chosen, rejected, strict=True)
    ]


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _render_prompt(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, now: datetime.datetime
) -> str:
    messages = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
    template = _template_at(tokenizer, pair.tools, now)
    if pair.tools and not re.search(r"\btools\b", template):
        raise PairError(
            f'{pair.source}: the row has "tools", which the chat template of {tokenizer.name_or_path} does not render; '
            'remove "tools" from the row, or use a model whose template takes tools'
        )
    try:
        text: Any = tokenizer.apply_chat_template(
            [_with_parsed_arguments(message) for message in messages],
            tools=list(pair.tools) if pair.tools else None,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=enable_thinking,
        )
    except TEMPLATE_ERRORS as error:
        raise PairError(
            f"{pair.source}: the chat template of {tokenizer.name_or_path} fails on the prompt "
            f"({type(error).__name__}: {error}); change the prompt's messages, or correct the template"
        ) from error
    assert isinstance(text, str), f"a chat template must give text, not {type(text)}"
    return text


def _with_parsed_arguments(message: Message) -> Message:
    """The message with every tool call's arguments as an object: servers parse the JSON text of the API as well."""
    calls = []
    given = message.get("tool_calls")
    for call in given if isinstance(given, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # text that is not JSON is rendered as it stands
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def _template_at(tokenizer: PreTrainedTokenizerBase, tools: list[Message] | None, now: datetime.datetime) -> str:
    """The chat template, in which every strftime_now("format") is the literal text of that format at `now`."""
    template = CLOCK_CALL.sub(
        lambda call: call["quote"] + now.strftime(call["format"]) + call["quote"],
        tokenizer.get_chat_template(tools=tools),
    )
    if "strftime_now" in CLOCK_TEST.sub("", template):
        raise PairError(
            f"{tokenizer.name_or_path}: the chat template reads the clock in a computed format, so its prompts cannot "
            "be kept the same over a run; write each call with a literal format, as in strftime_now('%d %b %Y')"
        )
    return template


def _rendered_turns(tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, now: datetime.datetime) -> str | None:
    """A question and the answer PROBE as the template renders them, or None if it cannot."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
    try:
        text: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=_template_at(tokenizer, None, now),
            tokenize=False,
            enable_thinking=enable_thinking,
        )
    except TEMPLATE_ERRORS:  # reported for the first prompt, with its line
        return None
    return text


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, in which special tokens are recognised and none is added."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        ids += batch["input_ids"]
    return ids


def _response_ids(
    responses: list[tuple[str, list[int] | None, str]], tokenizer: PreTrainedTokenizerBase, ends: EndTokens
) -> list[list[int]]:
    """Ids of (text, sampled ids or None, finish): the sampled ones, else the text's, with one end token unless cut."""
    remaining = iter(_encode([text for text, sampled, _ in responses if sampled is None], tokenizer))
    all_ids = []
    for _, sampled, finish in responses:
        ids = next(remaining) if sampled is None else sampled
        if sampled is None and finish == "stop" and not (ids and ids[-1] in ends.accepted):
            ids = [*ids, ends.turn_end]
        all_ids.append(ids)
    return all_ids


def _drop_reason(pair: TokenPair, record: Pair | TokenPair, ends: EndTokens | None, max_tokens: int) -> str | None:
    """The reason why the pair cannot be trained on, or None."""
    sides = (pair.chosen_ids,) if record.has_one_side else (pair.chosen_ids, pair.rejected_ids)
    if any(len(ids) == 0 for ids in sides):
        return "empty_response"
    if ends is not None:
        if any((ids[:-1] == end).any() for ids in sides for end in ends.accepted):
            return "end_token_inside"
        if isinstance(record, Pair):
            finishes = record.chosen_finish, record.rejected_finish
            if any(f == "stop" and ids[-1] not in ends.accepted for f, ids in zip(finishes, sides, strict=False)):
                return "no_end_token"
    if np.array_equal(pair.chosen_ids, pair.rejected_ids):
        return "identical_tokens"
    if len(pair.prompt_ids) + max(map(len, sides)) > max_tokens:
        return "too_long"
    return None
