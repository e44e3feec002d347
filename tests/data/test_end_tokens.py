"""The end token: where template, tokenizer and generation_config agree, and where they do not. Takes about 4 s."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from spot_megatron.data.end_tokens import PROBE, EndTokens, find_end_tokens
from spot_megatron.data.records import Pair
from spot_megatron.data.template import TokenizedPairs, tokenize_pairs
from spot_megatron.errors import PairError

EOT, START, END = 258, 259, 260  # <|endoftext|>, <|im_start|>, <|im_end|> of the fixture
ANSWER = f"<|im_start|>assistant\n{PROBE}"


def folder_says(tokenizer: PreTrainedTokenizerBase, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (Path(tokenizer.name_or_path) / name).write_text(text)


def tokenize(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> TokenizedPairs:
    fields: dict[str, Any] = {"id": "a", "prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
    return tokenize_pairs([Pair(**(fields | changes))], tokenizer, max_tokens=1000, enable_thinking=False)


@pytest.mark.parametrize(
    ("eos", "listed", "rendered", "turn_end", "accepted"),
    [
        ("<|im_end|>", None, f"{ANSWER}<|im_end|>\n", END, {END}),
        ("<|im_end|>", EOT, f"{ANSWER}<|im_end|>\n", END, {END, EOT}),  # the tokenizer's eos resolves it
        ("<|endoftext|>", [END, EOT], f"{ANSWER}<|im_end|>\n", END, {END, EOT}),  # the list resolves it
        ("<|endoftext|>", [END], f"{ANSWER}<|im_end|>\n", END, {END, EOT}),
        (None, [END, EOT], f"{ANSWER}<|im_end|>\n", END, {END, EOT}),
        ("<|im_end|>", None, f"{ANSWER} <|im_end|>", END, {END}),  # Llama 2 has a space there
        ("<|im_end|>", None, f"{PROBE}<|endoftext|>{ANSWER}<|im_end|>", END, {END}),  # the last answer counts
        # No end token rendered: the tokenizer's, where nothing contradicts it.
        ("<|im_end|>", None, f"{ANSWER}\n", END, {END}),
        ("<|im_end|>", [EOT, END], ANSWER, END, {END, EOT}),
        ("<|im_end|>", None, "no answer in it<|endoftext|>", END, {END}),
        ("<|im_end|>", None, None, END, {END}),
        (None, EOT, ANSWER, EOT, {EOT}),
    ],
)
def test_agreement(
    tokenizer: PreTrainedTokenizerBase,
    eos: str | None,
    listed: Any,
    rendered: str | None,
    turn_end: int,
    accepted: set[int],
) -> None:
    tokenizer.eos_token = eos
    if listed is not None:
        folder_says(tokenizer, "generation_config.json", {"eos_token_id": listed})
    assert find_end_tokens(tokenizer, rendered) == EndTokens(turn_end, frozenset(accepted))


def test_the_longest_token_behind_the_answer_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["<|im"])
    tokenizer.eos_token = "<|im_end|>"
    assert find_end_tokens(tokenizer, f"{ANSWER}<|im_end|>\n").turn_end == END


@pytest.mark.parametrize(
    ("eos", "listed", "rendered", "words"),
    [
        (
            "<|endoftext|>",
            None,
            f"{ANSWER}<|im_end|>",
            r"turn with <\|im_end\|> \(260\), but .* <\|endoftext\|> \(258\)",
        ),
        ("<|endoftext|>", [EOT], f"{ANSWER}<|im_end|>", "add 260 to eos_token_id in generation_config.json"),
        (None, EOT, f"{ANSWER}<|im_end|>", "add 260"),
        ("<|im_end|>", [EOT], ANSWER, r"eos_token is <\|im_end\|> \(260\), and .* lists <\|endoftext\|> \(258\)"),
        (None, [EOT, END], ANSWER, "eos_token is not set, and"),
        (None, None, f"{ANSWER}<|im_end|>", 'no end token; set "eos_token"'),
    ],
)
def test_a_disagreement_names_both(
    tokenizer: PreTrainedTokenizerBase, eos: str | None, listed: Any, rendered: str, words: str
) -> None:
    tokenizer.eos_token = eos
    if listed is not None:
        folder_says(tokenizer, "generation_config.json", {"eos_token_id": listed})
    with pytest.raises(PairError, match=words):
        find_end_tokens(tokenizer, rendered)


def test_config_json_counts_where_generation_config_is_silent(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    folder_says(tokenizer, "config.json", {"eos_token_id": END})
    assert find_end_tokens(tokenizer, f"{ANSWER}<|im_end|>").turn_end == END
    folder_says(tokenizer, "generation_config.json", {"eos_token_id": EOT})
    with pytest.raises(PairError):
        find_end_tokens(tokenizer, f"{ANSWER}<|im_end|>")


@pytest.mark.parametrize("content", ["{cut", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_a_broken_generation_config(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    folder_says(tokenizer, "generation_config.json", content)
    with pytest.raises(PairError, match=r"generation_config\.json"):
        find_end_tokens(tokenizer, None)


# The case of ../cases: eos <|endoftext|>, turns closed with <|im_end|>, generation_config lists both.


def test_responses_end_with_the_template_s_turn_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    folder_says(tokenizer, "generation_config.json", {"eos_token_id": [END, EOT]})
    (tokens,) = tokenize(tokenizer).pairs
    assert (tokens.chosen_ids[-1], tokens.rejected_ids[-1]) == (END, END)
    assert EOT not in tokens.chosen_ids


def test_sampled_ids_may_end_with_any_listed_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    folder_says(tokenizer, "generation_config.json", {"eos_token_id": [END, EOT]})
    for ids in ([1, 2, END], [1, 2, EOT]):
        (tokens,) = tokenize(tokenizer, rejected_ids=ids).pairs
        assert tokens.rejected_ids.tolist() == ids
    assert tokenize(tokenizer, rejected_ids=[1, 2, START]).dropped == {"no_end_token": ["a"]}
    for ids in ([1, END, 2, EOT], [1, EOT, 2, END]):
        assert tokenize(tokenizer, rejected_ids=ids).dropped == {"end_token_inside": ["a"]}


def test_a_text_that_ends_with_a_listed_token_gets_no_second_one(tokenizer: PreTrainedTokenizerBase) -> None:
    folder_says(tokenizer, "generation_config.json", {"eos_token_id": [END, EOT]})
    (tokens,) = tokenize(tokenizer, chosen="It is 4.<|endoftext|>").pairs
    assert tokens.chosen_ids.tolist()[-2:] == [tokenizer.convert_tokens_to_ids("."), EOT]
