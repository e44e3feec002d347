"""Text -> the ids that serving reads and writes. Takes about 4 s, most of it the import of transformers."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from spot_megatron.data.template import (
    TokenizedPairs,
    load_tokenizer,
)
from spot_megatron.errors import PairError
from tests.data.pairs import pair, token_pair, tokenize

OPEN, CLOSED = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
USER = {"role": "user", "content": "2+2?"}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The server's way: the rendered text through the bare tokenizer."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_text_prompt_is_one_user_message_with_an_empty_think_block(tokenizer: PreTrainedTokenizerBase) -> None:
    (tokens,) = tokenize(tokenizer, pair()).pairs
    assert tokens.prompt_ids.tolist() == encode(tokenizer, f"<|im_start|>user\n2+2?<|im_end|>\n{CLOSED}")
    (tokens,) = tokenize(tokenizer, pair(), enable_thinking=True).pairs
    assert tokens.prompt_ids.tolist() == encode(tokenizer, f"<|im_start|>user\n2+2?<|im_end|>\n{OPEN}")
    assert (tokens.id, tokens.source, tokens.prompt_ids.dtype) == ("a", "pairs.jsonl:1", np.int32)


def test_messages_are_taken_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "4"}, USER]
    (tokens,) = tokenize(tokenizer, pair(prompt=messages)).pairs
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    assert tokens.prompt_ids.tolist() == encode(tokenizer, turns + CLOSED)


def test_a_template_without_thinking_works(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    for enable_thinking in (False, True):
        (tokens,) = tokenize(tokenizer, pair(), enable_thinking=enable_thinking).pairs
        assert tokens.prompt_ids.tolist() == encode(tokenizer, "[user]2+2?[assistant]")


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("It is 4.", "stop", "It is 4.<|im_end|>"),
        ("It is 4.", "length", "It is 4."),  # cut: it never wrote an end token
        ("It is 4.<|im_end|>", "stop", "It is 4.<|im_end|>"),  # no second one
        ("\n\n It is 4. \n", "stop", "\n\n It is 4. \n<|im_end|>"),  # nothing is stripped
        ("<think>\nx\n</think>\n\n4", "stop", "<think>\nx\n</think>\n\n4<|im_end|>"),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_ends_with_its_one_end_token(
    tokenizer: PreTrainedTokenizerBase, side: str, text: str, finish: str, expected: str
) -> None:
    other = "rejected" if side == "chosen" else "chosen"
    (tokens,) = tokenize(tokenizer, pair(**{side: text, f"{side}_finish": finish, other: "Other."})).pairs
    assert getattr(tokens, f"{side}_ids").tolist() == encode(tokenizer, expected)
    assert getattr(tokens, f"{other}_ids").tolist() == encode(tokenizer, "Other.<|im_end|>")


def test_sampled_ids_win_over_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    letters = [*encode(tokenizer, "I"), *encode(tokenizer, "t is 5.<|im_end|>")]  # the text's ids would merge "It"
    assert letters != encode(tokenizer, "It is 5.<|im_end|>")
    (tokens,) = tokenize(tokenizer, pair(rejected_ids=letters)).pairs
    assert tokens.rejected_ids.tolist() == letters
    assert tokens.chosen_ids.tolist() == encode(tokenizer, "It is 4.<|im_end|>")
    cut = letters[:-2]
    (tokens,) = tokenize(tokenizer, pair(rejected_ids=cut, rejected_finish="length")).pairs
    assert tokens.rejected_ids.tolist() == cut


def test_drops_have_reasons(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    result = tokenize(
        tokenizer,
        pair(id="kept"),
        pair(id="inside", chosen="It<|im_end|> is 4."),
        pair(id="newline", rejected="It is 5.<|im_end|>\n"),
        pair(id="sampled inside", rejected_ids=[1, end, 2, end]),
        pair(id="no end", rejected_ids=[1, 2]),
        pair(id="same", chosen="It is 4.<|im_end|>", rejected="It is 4."),
        pair(id="long", chosen="4" * 1000),
        pair(id="kept too", rejected="It is 4", rejected_finish="length"),
    )
    assert [tokens.id for tokens in result.pairs] == ["kept", "kept too"]
    assert result.dropped == {
        "end_token_inside": ["inside", "newline", "sampled inside"],
        "no_end_token": ["no end"],
        "identical_tokens": ["same"],
        "too_long": ["long"],
    }


def test_a_response_without_a_token_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    result = tokenize(tokenizer, pair(chosen_ids=[], chosen_finish="length"))
    assert result.dropped == {"empty_response": ["a"]}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_limit_is_prompt_and_longer_response(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    record = pair(**{side: "a longer response"})
    prompt, response = f"<|im_start|>user\n2+2?<|im_end|>\n{CLOSED}", "a longer response<|im_end|>"
    longest = len(encode(tokenizer, prompt)) + len(encode(tokenizer, response))
    assert len(tokenize(tokenizer, record, max_tokens=longest).pairs) == 1
    assert tokenize(tokenizer, record, max_tokens=longest - 1).dropped == {"too_long": ["a"]}


def test_many_records_keep_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    records = [pair(id=str(n), chosen=f"{n}", rejected_ids=[n % 200, tokenizer.eos_token_id]) for n in range(600)]
    tokens = tokenize(tokenizer, *records).pairs
    assert [one.id for one in tokens] == [str(n) for n in range(600)]
    assert [one.chosen_ids.tolist() for one in tokens] == [encode(tokenizer, f"{n}<|im_end|>") for n in range(600)]
    assert [one.rejected_ids[0] for one in tokens] == [n % 200 for n in range(600)]


def test_token_pairs_need_no_tokenizer_and_get_the_same_checks(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    records = [
        token_pair([1], [2, end], [3, end], id="kept"),
        token_pair([1], [2, end, 2], [3, end], id="inside"),
        token_pair([1], [2], [2], id="same"),
        token_pair([1] * 999, [2, end], [3, end], id="long"),
    ]
    dropped = {"identical_tokens": ["same"], "too_long": ["long"]}
    assert tokenize(None, *records) == TokenizedPairs(records[:2], dropped)
    assert tokenize(tokenizer, *records) == TokenizedPairs(records[:1], dropped | {"end_token_inside": ["inside"]})


def test_texts_without_a_tokenizer() -> None:
    with pytest.raises(PairError, match=r"pairs\.jsonl:1: pairs in text need a tokenizer"):
        tokenize(None, pair())


def test_no_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(PairError, match=r"model: the tokenizer has no chat template.*copy"):
        tokenize(tokenizer, pair())


def test_no_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    with pytest.raises(PairError, match=r'model: the tokenizer has no end token; set "eos_token"'):
        tokenize(tokenizer, pair())


def test_named_templates_need_a_default(tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    tokenizer.chat_template = {"rag": template, "tool_use": "{{ raise_exception('never') }}"}
    with pytest.raises(PairError, match=r"model: .*chat templates rag, tool_use, but none is named default; save"):
        tokenize(tokenizer, pair())
    tokenizer.chat_template = {"default": template, "rag": "{{ raise_exception('never') }}"}
    (tokens,) = tokenize(tokenizer, pair()).pairs
    assert tokens.prompt_ids.tolist() == encode(tokenizer, f"<|im_start|>user\n2+2?<|im_end|>\n{CLOSED}")


def test_templates_run_in_a_sandbox(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    template = tokenizer.chat_template
    secret = tmp_path / "secret"
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.system('touch " + str(secret) + "') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ):
        tokenizer.chat_template = attack + template
        with pytest.raises(PairError, match=r"pairs\.jsonl:1: the chat template of .*model fails on the prompt"):
            tokenize(tokenizer, pair())
    assert not secret.exists()


CLOCK = "{% if strftime_now is defined %}{{ strftime_now(\"%d %b %Y\") }} {{ strftime_now ( '%H' ) }}{% endif %}"


def test_a_template_that_reads_the_clock_is_rendered_at_the_time_given(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CLOCK + tokenizer.chat_template
    turns = f"<|im_start|>user\n2+2?<|im_end|>\n{CLOSED}"
    for now, text in (
        (datetime.datetime(2024, 7, 26, 9), "26 Jul 2024 09"),
        (datetime.datetime(2031, 1, 2, 23), "02 Jan 2031 23"),
    ):
        (tokens,) = tokenize(tokenizer, pair(), now=now).pairs
        assert tokens.prompt_ids.tolist() == encode(tokenizer, text + turns)
    before = datetime.datetime.now()
    (tokens,) = tokenize(tokenizer, pair()).pairs
    texts = [now.strftime("%d %b %Y %H") for now in (before, datetime.datetime.now())]
    assert tokens.prompt_ids.tolist() in [encode(tokenizer, text + turns) for text in texts]


@pytest.mark.parametrize(
    "clock",
    [
        "{% set f = '%d' %}{{ strftime_now(f) }}",
        "{% set now = strftime_now %}{{ now('%d') }}",
        "{{ strftime_now('%d' ~ '%Y') }}",
        "{{ '%d' | map(strftime_now) }}",
    ],
)
def test_a_clock_that_cannot_be_kept_still_is_refused(tokenizer: PreTrainedTokenizerBase, clock: str) -> None:
    tokenizer.chat_template = clock + tokenizer.chat_template
    with pytest.raises(PairError, match=r"model: the chat template reads the clock in a computed format"):
        tokenize(tokenizer, pair())


@pytest.mark.parametrize(
    ("given", "rendered"),
    [('{"a":1}', '{"a": 1}'), ({"a": 1}, '{"a": 1}'), ("not JSON", '"not JSON"')],
)
def test_arguments_of_tool_calls_are_rendered_as_servers_do(
    tokenizer: PreTrainedTokenizerBase, given: object, rendered: str
) -> None:
    """vLLM and SGLang parse the API's JSON text; a template's `tojson` would else put it in quotes."""
    calls = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    tokenizer.chat_template = calls + "{% endfor %}"
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    prompt = [USER, called, {"role": "tool", "content": "17"}]
    (tokens,) = tokenize(tokenizer, pair(prompt=prompt)).pairs
    assert tokens.prompt_ids.tolist() == encode(tokenizer, rendered)
    assert called["tool_calls"][0]["function"]["arguments"] == given


TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_go_to_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PairError, match=r'pairs\.jsonl:1: the row has "tools", which the chat template .* not render'):
        tokenize(tokenizer, pair(tools=TOOLS))
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    with_tools, without = tokenize(tokenizer, pair(tools=TOOLS), pair(id="b")).pairs
    turns = f"<|im_start|>user\n2+2?<|im_end|>\n{CLOSED}"
    assert with_tools.prompt_ids.tolist() == encode(tokenizer, json.dumps(TOOLS) + turns)
    assert without.prompt_ids.tolist() == encode(tokenizer, turns)


def test_saved_truncation_and_padding_are_switched_off(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer.json may hold both; they would cut or fill prompts and responses."""
    folder = Path(tokenizer.name_or_path)
    expected = tokenize(tokenizer, pair(prompt="2+2? " * 20)).pairs[0]
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (tokens,) = tokenize(load_tokenizer(folder), pair(prompt="2+2? " * 20)).pairs
    for side in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert getattr(tokens, side).tolist() == getattr(expected, side).tolist()


def test_a_prompt_that_the_template_refuses(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PairError, match=r"pairs\.jsonl:1: the chat template of .*model fails on .*unknown role"):
        tokenize(tokenizer, pair(prompt=[{"role": "tool", "content": "x"}]))
    called: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{}]}
    with pytest.raises(PairError, match=r"pairs\.jsonl:1: the chat template of .*model fails on"):
        tokenize(tokenizer, pair(prompt=[USER, called, USER]))


def test_reading_pairs_imports_neither_torch_nor_megatron() -> None:
    program = (
        "import sys, spot_megatron.data.template, spot_megatron.data.pack, spot_megatron.data.sampler\n"
        "sys.exit(bool({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
