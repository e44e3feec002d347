"""Preference pairs in text -> token ids: exactly the prompt that is served and the response that is sampled.

The prompt is the chat template's, with its generation prompt: what the server feeds the model before the first sampled
token, Qwen3's empty think block included. The response is what the model wrote after it, up to and including its end
token. Sampled ids are used where a record has them, because tokenising their text again may give others. Nothing is
truncated: a pair that cannot be trained on as it is gets dropped under a reason, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from spot_megatron.data.records import Pair, TokenPair
from spot_megatron.errors import PairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 256  # texts tokenised in one call: it keeps their offsets in memory until it returns


@dataclass(frozen=True)
class TokenizedPairs:
    """The pairs to train on, in order, and the ids of the dropped ones by reason.

    Reasons: too_long (prompt and longer response exceed the limit), identical_tokens (the responses differ in text at
    most), end_token_inside (a response goes on after its end token), no_end_token (sampled ids of a response that was
    not cut lack it), empty_response (a text without a token).
    """

    pairs: list[TokenPair]
    dropped: dict[str, list[str]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; nothing is downloaded. Raises PairError if it cannot be loaded."""
    from transformers import AutoTokenizer  # takes seconds, and pairs in token ids need no tokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise PairError(
            f"{folder}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); copy the model's "
            "tokenizer.json and tokenizer_config.json into this folder, or use pairs of data.format token_ids"
        ) from error


def tokenize_pairs(
    records: Sequence[Pair | TokenPair],
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
    enable_thinking: bool,
    now: datetime | None = None,
) -> TokenizedPairs:
    """Token ids of every record that can be trained on within `max_tokens` (prompt and longer response).

    `enable_thinking` goes to the chat template; templates without it ignore it, as they do in serving. `now` is the
    time for templates that read the clock (`strftime_now`), by default the present. Records in token ids need no
    tokenizer. Raises PairError if the tokenizer, or the template for one of the prompts, cannot be used.
    """
    texts = [record for record in records if isinstance(record, Pair)]
    end_id = None if tokenizer is None else tokenizer.eos_token_id
    tokenized_texts = iter(_tokenize(texts, tokenizer, enable_thinking, now or datetime.now()) if texts else [])
    pairs: list[TokenPair] = []
    dropped: dict[str, list[str]] = {}
    for record in records:
        pair = next(tokenized_texts) if isinstance(record, Pair) else record
        reason = _drop_reason(pair, record, end_id, max_tokens)
        if reason is None:
            pairs.append(pair)
        else:
            dropped.setdefault(reason, []).append(pair.id)
    return TokenizedPairs(pairs, dropped)


def check_vocabulary(pairs: Sequence[TokenPair], vocab_size: int, hint: str) -> None:
    """Raises PairError if a token id is not below `vocab_size`; `hint` says where that size stands."""
    for pair in pairs:
        largest = max(int(ids.max()) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        if largest >= vocab_size:
            raise PairError(
                f"{pair.source}: pair {pair.id} holds token id {largest}, which takes a vocabulary of {largest + 1}; "
                f"the model's has {vocab_size} ({hint}); tokenise the pairs with this model's tokenizer"
            )


def _tokenize(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerBase | None, enable_thinking: bool, now: datetime
) -> list[TokenPair]:
    if tokenizer is None:
        raise PairError(f"{pairs[0].source}: pairs in text need a tokenizer, or convert them to data.format token_ids")
    folder = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise PairError(
            f"{folder}: the tokenizer has no chat template, so the served prompt is unknown; copy the instruct model's "
            "chat_template.jinja into this folder, or use pairs of data.format token_ids"
        )
    if tokenizer.eos_token_id is None:
        raise PairError(f'{folder}: the tokenizer has no end token; set "eos_token" in tokenizer_config.json')
    prompts = [_prompt_ids(pair, tokenizer, enable_thinking, now) for pair in pairs]
    chosen = _response_ids([(pair.chosen, pair.chosen_ids, pair.chosen_finish) for pair in pairs], tokenizer)
    rejected = _response_ids([(pair.rejected, pair.rejected_ids, pair.rejected_finish) for pair in pairs], tokenizer)
    return [
        TokenPair(pair.id, _int32(prompt), _int32(side), _int32(other), pair.source)
        for pair, prompt, side, other in zip(pairs, prompts, chosen, rejected, strict=True)
    ]


def _int32(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _prompt_ids(pair: Pair, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool, now: datetime) -> list[int]:
    messages = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
    try:
        ids: Any = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=enable_thinking,
            strftime_now=now.strftime,  # in place of transformers' own, which reads the clock
        )
    except (TemplateError, TypeError) as error:  # a template raises either on messages that it was not written for
        raise PairError(
            f"{pair.source}: the chat template of {tokenizer.name_or_path} refuses the prompt ({error}); change the "
            "prompt's messages"
        ) from error
    assert isinstance(ids, list), f"a chat template must give token ids, not {type(ids)}"
    return ids


def _response_ids(
    responses: list[tuple[str, list[int] | None, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Ids of (text, sampled ids or None, finish): the sampled ones, else the text's, with one end token unless cut."""
    texts = [text for text, sampled, _ in responses if sampled is None]
    tokenized: list[list[int]] = []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        tokenized += tokenizer(batch, add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
    remaining = iter(tokenized)
    all_ids = []
    for _, sampled, finish in responses:
        ids = next(remaining) if sampled is None else sampled
        if sampled is None and finish == "stop" and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        all_ids.append(ids)
    return all_ids


def _drop_reason(pair: TokenPair, record: Pair | TokenPair, end_id: int | None, max_tokens: int) -> str | None:
    """Why the pair cannot be trained on, or None."""
    sides = pair.chosen_ids, pair.rejected_ids
    if any(len(ids) == 0 for ids in sides):
        return "empty_response"
    if end_id is not None and any((ids[:-1] == end_id).any() for ids in sides):
        return "end_token_inside"
    if isinstance(record, Pair):
        finishes = record.chosen_finish, record.rejected_finish
        if any(finish == "stop" and ids[-1] != end_id for finish, ids in zip(finishes, sides, strict=True)):
            return "no_end_token"
    if np.array_equal(*sides):
        return "identical_tokens"
    if len(pair.prompt_ids) + max(map(len, sides)) > max_tokens:
        return "too_long"
    return None
