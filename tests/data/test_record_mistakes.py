"""Mistakes in pair files, each with its file, line and remedy; and any bytes. Takes about 3 s."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spot_megatron.data.records import Format, read_pairs
from spot_megatron.errors import PairError
from tests.data.rows import FIVE, FOUR, SPOT, TOKEN_IDS, TRL, USER, VISUAL, write

# Each line below follows a good first line of its format, so that the message must say :2.


def changed(row: dict[str, Any], **changes: Any) -> str:
    """The row with keys replaced, or removed where the value is None."""
    return json.dumps({key: value for key, value in (row | changes).items() if value is not None})


B_SPOT, B_TOKENS = SPOT | {"id": "b"}, TOKEN_IDS | {"id": "b"}

MISTAKES: dict[str, tuple[dict[str, Any], str | bytes, list[str]]] = {
    "cut last line": (SPOT, '{"id": "b", "prom', ["not valid JSON", "cut off"]),
    "malformed": (SPOT, '{"id": b}\n', ["not valid JSON", "one complete JSON object"]),
    "key twice": (SPOT, '{"id": "b", "id": "c"}\n', ["'id' occurs twice"]),
    "nested too deeply": (SPOT, "[" * 100_000 + "\n", ["not valid JSON"]),
    "number too long": (SPOT, "1" * 10_000 + "\n", ["not valid JSON"]),
    "array": (SPOT, json.dumps([SPOT]), ["a JSON array", "jq -c"]),
    "text": (SPOT, '"pair"', ["a string instead of a JSON object"]),
    "null": (SPOT, "null", ["null instead of a JSON object"]),
    "not UTF-8": (SPOT, changed(B_SPOT, chosen="4é").replace("\\u00e9", "é").encode("latin-1"), ["not UTF-8"]),
    "half a character": (SPOT, changed(B_SPOT, chosen="4\ud83d"), ["half a character"]),
    "half a character in meta": (SPOT, changed(B_SPOT, meta={"x": ["\udc00"]}), ["half a character"]),
    "empty id": (SPOT, changed(B_SPOT, id=" "), ['"id" is empty']),
    "id is a list": (SPOT, changed(B_SPOT, id=["b"]), ['"id" must be a string or a whole number, not a list']),
    "id is true": (SPOT, changed(B_SPOT, id=True), ['"id" must be a string or a whole number, not true or false']),
    "id again": (SPOT, changed(SPOT), ['id "a" was already used', "pairs.jsonl:1"]),
    "no prompt": (SPOT, changed(B_SPOT, prompt=None), ['"prompt" is missing', "chosen, id, rejected"]),
    "no chosen": (SPOT, changed(B_SPOT, chosen=None), ['"chosen" is missing']),
    "unknown key": (
        SPOT,
        changed(B_SPOT, chosen_finsh="stop"),
        ['unknown key "chosen_finsh"', 'did you mean "chosen_finish"?'],
    ),
    "near miss beside ids": (TOKEN_IDS, changed(B_TOKENS, prompt_id=[1]), ['"prompt_id"', 'mean "prompt_ids"?']),
    "near miss of the reference's": (VISUAL, changed(VISUAL, rejected_finsh="length"), ['mean "rejected_finish"?']),
    "empty chosen": (SPOT, changed(B_SPOT, chosen=" \n"), ['"chosen" is empty']),
    "empty rejected": (SPOT, changed(B_SPOT, rejected=""), ['"rejected" is empty']),
    "chosen is a number": (SPOT, changed(B_SPOT, chosen=4), ['"chosen" must be a string, not a number']),
    "chosen is a list": (SPOT, changed(B_SPOT, chosen=[FOUR]), ['"chosen" must be a string, not a list']),
    "identical": (SPOT, changed(B_SPOT, chosen="It is 5."), ["are equal", "remove the line"]),
    "empty prompt": (SPOT, changed(B_SPOT, prompt=" "), ['"prompt" is empty']),
    "no message": (SPOT, changed(B_SPOT, prompt=[]), ['"prompt" is empty']),
    "empty message": (SPOT, changed(B_SPOT, prompt=[USER | {"content": " "}]), ['last message of "prompt" is empty']),
    "message is a text": (SPOT, changed(B_SPOT, prompt=["2+2?"]), ['message 0 of "prompt" must be an object']),
    "message without content": (SPOT, changed(B_SPOT, prompt=[{"role": "user"}]), ['with "role" and "content"']),
    "unknown role": (SPOT, changed(B_SPOT, prompt=[USER | {"role": "human"}]), ["role 'human'", "user"]),
    "role is a list": (SPOT, changed(B_SPOT, prompt=[USER | {"role": ["user"]}]), ["role ['user']"]),
    "content in parts": (SPOT, changed(B_SPOT, prompt=[USER | {"content": [{"text": "2"}]}]), ["must be a string"]),
    "prompt ends with an answer": (SPOT, changed(B_SPOT, prompt=[USER, FOUR]), ["is by assistant"]),
    "bad finish": (SPOT, changed(B_SPOT, chosen_finish="eos"), ['"chosen_finish" is "eos"', "stop, length"]),
    "finish is a list": (SPOT, changed(B_SPOT, chosen_finish=["stop"]), ["stop, length"]),
    "meta is a text": (SPOT, changed(B_SPOT, meta="x"), ['"meta" must be an object, not a string']),
    "no sampled ids": (SPOT, changed(B_SPOT, chosen_ids=[]), ['"chosen_ids" is empty']),
    "wrong sampled ids": (SPOT, changed(B_SPOT, chosen_ids=["3"]), ['"chosen_ids" must be a list of whole numbers']),
    "negative id": (TOKEN_IDS, changed(B_TOKENS, chosen_ids=[3, -1]), ['"chosen_ids" holds -1']),
    "too large id": (TOKEN_IDS, changed(B_TOKENS, chosen_ids=[2**31]), ["holds 2147483648"]),
    "id with a fraction": (TOKEN_IDS, changed(B_TOKENS, prompt_ids=[1.0]), ["list of whole numbers"]),
    "id is true in ids": (TOKEN_IDS, changed(B_TOKENS, prompt_ids=[True]), ["list of whole numbers"]),
    "ids are a text": (TOKEN_IDS, changed(B_TOKENS, prompt_ids="12"), ["list of whole numbers"]),
    "no prompt ids": (TOKEN_IDS, changed(B_TOKENS, prompt_ids=[]), ['"prompt_ids" is empty']),
    "no rejected ids": (TOKEN_IDS, changed(B_TOKENS, rejected_ids=None), ['"rejected_ids" is missing']),
    "same ids": (TOKEN_IDS, changed(B_TOKENS, chosen_ids=[4, 9]), ["are equal"]),
    "text beside ids": (TOKEN_IDS, changed(B_TOKENS, prompt="x"), ['unknown key "prompt"']),
    "template arguments": (TRL, changed(TRL, chat_template_kwargs={"a": 1}), ['"chat_template_kwargs"']),
    "texts without prompt": (TRL, '{"chosen": "Hi a", "rejected": "Hi b"}', ['"prompt" is missing']),
    "messages without prompt": (TRL, changed(TRL, prompt=None), ['"prompt" is missing', "no message before"]),
    "text and messages": (TRL, changed(TRL, chosen="4"), ['"rejected" must be a string, not a list']),
    "no last message": (TRL, changed(TRL, chosen=[]), ['"chosen" must end with an assistant message']),
    "ends with user": (TRL, changed(TRL, chosen=[USER]), ['"chosen" must end with an assistant message']),
    "empty response": (TRL, changed(TRL, chosen=[FOUR | {"content": ""}]), ['"chosen" is empty']),
    "tool call": (TRL, changed(TRL, chosen=[FOUR | {"tool_calls": [{}]}]), ['"tool_calls"', "would be lost"]),
    "contexts differ": (
        TRL,
        json.dumps({"chosen": [USER, FOUR], "rejected": [USER | {"content": "3+3?"}, FIVE]}),
        ["differ before their last message"],
    ),
    "two prompts": (
        TRL,
        json.dumps({"prompt": "3+3?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}),
        ['"prompt" differs from the messages'],
    ),
    "direct mode": (VISUAL, changed(VISUAL, original_answer=""), ['"original_answer" is empty']),
    "verified file": (VISUAL, changed(VISUAL, original_answer=None), ['"original_answer" is missing']),
    "cut correction": (
        VISUAL,
        changed(VISUAL, gemini_corrected_answer="=== CORRECTED STARTED ===\nIt is"),
        ["no complete text between"],
    ),
    "mixed formats": (SPOT, changed(TOKEN_IDS), ["looks like format token_ids", "pairs.jsonl:1 is spot"]),
    "mixed with the reference's": (TOKEN_IDS, changed(VISUAL), ["looks like format visual_ai_spot"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_file_line_and_remedy(file: Path, name: str) -> None:
    first, second, expected = MISTAKES[name]
    raw = second if isinstance(second, bytes) else second.encode()
    file.write_bytes(json.dumps(first).encode() + b"\n" + raw)
    with pytest.raises(PairError) as raised:
        read_pairs([file])
    message = str(raised.value)
    assert message.startswith(f"{file}:2: ")
    assert "\n" not in message
    for fragment in expected:
        assert fragment in message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PairError, match=r"missing\.jsonl: cannot be read \(No such file"):
        read_pairs([tmp_path / "missing.jsonl"])
    with pytest.raises(PairError, match="cannot be read"):
        read_pairs([tmp_path])
    with pytest.raises(PairError, match=r"data\.pairs names no file"):
        read_pairs([])
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(PairError, match=r"empty\.jsonl: the file holds no pair"):
            read_pairs([tmp_path / "empty.jsonl"])


def test_an_unknown_format_lists_the_keys(file: Path) -> None:
    with pytest.raises(PairError, match=r":1: cannot tell the format from the keys \['completion', 'label'\]"):
        read_pairs([write(file, {"completion": "x", "label": True})])


def test_the_format_asked_for_must_be_the_file_s(file: Path) -> None:
    with pytest.raises(PairError, match=r":1: looks like format visual_ai_spot, but data\.format is trl"):
        read_pairs([write(file, VISUAL)], "trl")


def test_ids_are_unique_over_files(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", SPOT), write(tmp_path / "b.jsonl", SPOT)]
    with pytest.raises(PairError, match=r'b\.jsonl:1: id "a" was already used at .*a\.jsonl:1'):
        read_pairs(files)


# Whatever the bytes, either every line becomes a record or the user is told.

FORMATS: list[Format] = ["auto", "spot", "trl", "visual_ai_spot", "token_ids"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**33) | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
GOOD: list[dict[str, Any]] = [SPOT, TOKEN_IDS, VISUAL, TRL, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}]
KEYS = sorted(
    {key for row in GOOD for key in row}
    | {"chosen_finish", "chosen_ids", "meta", "tools", "index", "system", "history"}
)
rows_nearly_good = st.builds(
    lambda row, changes: json.dumps(row | changes).encode(),
    st.sampled_from(GOOD),
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2),
)
bytes_nearly_good = st.builds(
    lambda rows, at, junk: (text := b"\n".join(rows))[: at % (len(text) + 1)] + junk + text[at % (len(text) + 1) :],
    st.lists(rows_nearly_good, min_size=1, max_size=3),
    st.integers(0, 10_000),
    st.binary(max_size=4),
)


def check_nothing_is_lost(file: Path, content: bytes, format: Format) -> None:
    file.write_bytes(content)
    try:
        outcome: Any = len(read_pairs([file], format))
    except PairError as error:
        outcome = str(error)[: len(str(file))]
    assert outcome in (str(file), sum(1 for line in content.split(b"\n") if line.strip()))


@given(st.binary() | bytes_nearly_good | rows_nearly_good, st.sampled_from(FORMATS))
@settings(max_examples=500)
def test_any_bytes_are_read_whole_or_refused(file: Path, content: bytes, format: Format) -> None:
    check_nothing_is_lost(file, content, format)


@given(st.lists(st.sampled_from(GOOD), min_size=1, max_size=4), st.sampled_from(FORMATS))
def test_good_rows_are_read_whole_or_refused(file: Path, rows: list[dict[str, Any]], format: Format) -> None:
    numbered = [row | ({"id": str(n)} if "id" in row else {}) for n, row in enumerate(rows)]
    check_nothing_is_lost(file, "\n".join(map(json.dumps, numbered)).encode(), format)
