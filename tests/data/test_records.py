"""Pair files: every format, every mistake with its file, line and remedy. Takes about 5 s."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spot_megatron.data.prompts import REFUSED_COLUMNS
from spot_megatron.data.records import Format, Pair, TokenPair, read_pairs
from spot_megatron.errors import PairError

SPOT = {"id": "a", "prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
TOKEN_IDS = {"id": "a", "prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4, 9]}
USER = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "It is 5."}
TRL = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
VISUAL = {"question": "2+2?", "gemini_corrected_answer": "It is 4.", "original_answer": "It is 5."}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def read_one(file: Path, row: dict[str, Any], format: Format = "auto") -> Any:
    (record,) = read_pairs([write(file, row)], format)
    return record


# Formats


def test_spot(file: Path) -> None:
    more = {"rejected_finish": "length", "meta": {"gamma": 0.1}, "rejected_ids": [7, 8]}
    first, second = read_pairs([write(file, SPOT, SPOT | more | {"id": "b", "prompt": [USER]})])
    assert isinstance(first, Pair)
    assert (first.id, first.prompt, first.chosen, first.rejected) == ("a", "2+2?", "It is 4.", "It is 5.")
    assert (first.chosen_finish, first.rejected_finish, first.meta) == ("stop", "stop", {})
    assert first.chosen_ids is None
    assert first.source == f"{file}:1"
    assert isinstance(second, Pair)
    assert (second.prompt, second.rejected_finish, second.rejected_ids) == ([USER], "length", [7, 8])
    assert second.meta == {"gamma": 0.1}
    assert second.source == f"{file}:2"


def test_texts_are_kept_as_they_are(file: Path) -> None:
    pair = read_one(file, SPOT | {"chosen": "  \u2028 4\r\n", "rejected": "\n\n5 é 😀 "})
    assert (pair.chosen, pair.rejected) == ("  \u2028 4\r\n", "\n\n5 é 😀 ")


def test_token_ids(file: Path) -> None:
    pair = read_one(file, TOKEN_IDS)
    assert isinstance(pair, TokenPair)
    assert pair.id == "a"
    assert (pair.prompt_ids.tolist(), pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) == ([1, 2], [3, 9], [4, 9])
    assert {pair.prompt_ids.dtype.name, pair.chosen_ids.dtype.name} == {"int32"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}, "2+2?"),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, [USER]),
        ({"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]}, "2+2?"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, [USER]),
        ({"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "2+2?"),
    ],
)
def test_trl(file: Path, row: dict[str, Any], prompt: Any) -> None:
    pair = read_one(file, row | {"score_chosen": 8.5})
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("line-1", prompt, "It is 4.", "It is 5.")
    assert pair.meta == {"score_chosen": 8.5}


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rejected_finsh", "rejected_finish"),
        ("rejected-finish", "rejected_finish"),
        ("rejected_finish_reason", "rejected_finish"),
        ("Chosen_Finish", "chosen_finish"),
        ("chosenfinish", "chosen_finish"),
        ("rejcted_finish", "rejected_finish"),
        ("rejected_id", "rejected_ids"),
        ("ID", "id"),
        ("promt", "prompt"),
    ],
)
def test_a_misspelt_key_is_no_column_of_trl_s_data(file: Path, key: str, meant: str) -> None:
    """Without an id the row is read as TRL's: a slip would train a cut answer as one that ended by itself."""
    row = {"prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is", key: "length"}
    with pytest.raises(PairError, match=rf':1: unknown key "{key}"; did you mean "{meant}"\?.*meta'):
        read_one(file, row)


def test_columns_of_public_preference_data_are_kept(file: Path) -> None:
    """Of UltraFeedback, its binarised form, Argilla's DPO mixes, HelpSteer and Magpie."""
    names = (
        "prompt_id messages score_chosen score_rejected source instruction dataset idx uuid index category language "
        "chosen_rating rejected_rating chosen_model rejected_model chosen_score rejected_score chosen_avg_rating "
        "rating_chosen chosen_policy rejected_policy chosen_response rejected_response chosen_reward margin metadata "
        "model_name generations ratings rationales chosen_feedback rejected_reason chosen_tokens preference_strength"
    )
    columns = dict.fromkeys(names.split(), 1)
    row = {key: SPOT[key] for key in ("prompt", "chosen", "rejected")}
    assert read_one(file, row | columns).meta == columns


def test_trl_can_be_asked_for_where_rows_have_ids(file: Path) -> None:
    pair = read_one(file, SPOT | {"score_chosen": 8.5, "rejected_finish": "length"}, "trl")
    assert (pair.id, pair.rejected_finish, pair.meta) == ("a", "length", {"score_chosen": 8.5})


def test_visual_ai_spot(file: Path) -> None:
    marked = "Sure.\n=== CORRECTED STARTED ===\nIt is 4.\n=== CORRECTED ENDED ===\n"
    rows = [
        VISUAL | {"index": 17, "is_correct": True},
        VISUAL | {"index": ""},
        VISUAL | {"index": "x", "gemini_corrected_answer": marked, "original_answer": "\n\nIt is 5. "},
    ]
    pairs = read_pairs([write(file, *rows)])
    assert [pair.id for pair in pairs] == ["17", "line-2", "x"]
    assert all(isinstance(pair, Pair) and (pair.prompt, pair.chosen) == ("2+2?", "It is 4.") for pair in pairs)
    assert [pair.rejected for pair in pairs if isinstance(pair, Pair)] == ["It is 5.", "It is 5.", "It is 5. "]
    assert isinstance(pairs[0], Pair)
    assert pairs[0].meta == {"index": 17, "is_correct": True}


def test_visual_ai_spot_takes_the_prompt_where_there_is_no_question(file: Path) -> None:
    row = {"prompt": "3+3?", "gemini_corrected_answer": "6", "original_answer": "7"}
    assert read_one(file, row).prompt == "3+3?"
    both = read_one(file, VISUAL | {"prompt": "rendered", "chosen": 1})
    assert (both.prompt, both.meta) == ("2+2?", {"prompt": "rendered", "chosen": 1})


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    row = {key: SPOT[key] for key in ("prompt", "chosen", "rejected")}
    files = [write(tmp_path / "b.jsonl", row, row), write(tmp_path / "a.jsonl", row)]
    assert [pair.id for pair in read_pairs(files)] == ["b.jsonl:line-1", "b.jsonl:line-2", "a.jsonl:line-1"]


def test_blank_lines_byte_order_mark_and_missing_last_newline(file: Path) -> None:
    lines = [json.dumps(SPOT | {"id": str(number)}) for number in range(3)]
    file.write_bytes(b"\xef\xbb\xbf" + f"{lines[0]}\r\n\n  \n{lines[1]}\n{lines[2]}".encode())
    pairs = read_pairs([file])
    assert [(pair.id, pair.source) for pair in pairs] == [("0", f"{file}:1"), ("1", f"{file}:4"), ("2", f"{file}:5")]


# Columns besides those of the format


@pytest.mark.parametrize("row", [SPOT, TOKEN_IDS, TRL, VISUAL])
def test_unknown_columns_are_kept_in_meta(file: Path, row: dict[str, Any]) -> None:
    columns = {"score": 0.5, "source": "x", "zzz": [1, {"a": None}]}
    assert read_one(file, row | columns).meta == columns
    assert read_one(file, row | columns | {"meta": {"gamma": 1}}).meta == {"gamma": 1} | columns


@pytest.mark.parametrize("row", [SPOT, TOKEN_IDS, TRL, VISUAL])
def test_a_row_without_an_id_is_named_by_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    nameless = {key: value for key, value in row.items() if key != "id"}
    null = nameless | {"id": None}
    a, b = write(tmp_path / "a.jsonl", nameless, null), write(tmp_path / "b.jsonl", nameless)
    format: Format = "spot" if row is SPOT else "auto"
    assert [record.id for record in read_pairs([a], format)] == ["line-1", "line-2"]
    assert [record.id for record in read_pairs([a, b], format)] == [
        "a.jsonl:line-1",
        "a.jsonl:line-2",
        "b.jsonl:line-1",
    ]


SYSTEM = {"role": "system", "content": "Answer like a pirate."}
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
COUNT = [{"type": "function", "function": {"name": "count"}}]


@pytest.mark.parametrize(
    "row", [SPOT, TRL, VISUAL, SPOT | {"prompt": [USER]}, {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}]
)
def test_system_history_and_tools_are_used(file: Path, row: dict[str, Any]) -> None:
    columns = {"system": SYSTEM["content"], "history": [["hello", "good day"]], "tools": COUNT}
    pair = read_one(file, row | columns)
    assert (pair.prompt, pair.tools, pair.meta) == ([SYSTEM, *TURNS, USER], COUNT, {})
    assert read_one(file, row | {"history": TURNS}).prompt == [*TURNS, USER]
    assert read_one(file, row | {"system": SYSTEM["content"]}).prompt == [SYSTEM, USER]
    assert read_one(file, row | {"tools": json.dumps(COUNT)}).tools == COUNT
    empty = read_one(file, row | {"system": "", "history": [], "tools": None, "images": []})
    assert (empty.prompt, empty.tools, empty.meta) == (read_one(file, row).prompt, None, {"images": []})


def test_a_system_message_in_the_prompt_stays_first(file: Path) -> None:
    row = SPOT | {"prompt": [SYSTEM, USER], "history": [["hello", "good day"]]}
    assert read_one(file, row).prompt == [SYSTEM, *TURNS, USER]
    assert read_one(file, row | {"system": SYSTEM["content"]}).prompt == [SYSTEM, *TURNS, USER]
    with pytest.raises(PairError, match='"system" differs from the system message'):
        read_one(file, row | {"system": "Be brief."})


def test_messages_keep_calls_and_names(file: Path) -> None:
    prompt = [
        USER | {"name": "ada"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "count", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "name": "count", "content": "17"},
    ]
    assert read_one(file, SPOT | {"prompt": prompt}).prompt == prompt


@pytest.mark.parametrize("row", [SPOT, TRL, VISUAL, TOKEN_IDS])
@pytest.mark.parametrize("key", REFUSED_COLUMNS)
def test_other_columns_that_shape_the_prompt_are_refused(file: Path, row: dict[str, Any], key: str) -> None:
    for value in (["x"], "x", False):
        with pytest.raises(PairError, match=f':1: "{key}" would change the prompt'):
            read_one(file, row | {key: value})


@pytest.mark.parametrize("row", [SPOT, TRL, VISUAL])
@pytest.mark.parametrize(
    ("key", "meant"),
    [("System", "system"), ("systems", "system"), ("histroy", "history"), ("tool", "tools"), ("imgaes", "images"),
     ("system-prompt", "system_prompt"), ("document", "documents")],
)  # fmt: skip
def test_near_misses_of_such_columns(file: Path, row: dict[str, Any], key: str, meant: str) -> None:
    with pytest.raises(PairError, match=f'unknown key "{key}"; did you mean "{meant}"'):
        read_one(file, row | {key: "x"})


@pytest.mark.parametrize("key", ["system", "history", "tools", "prompt", "chosen"])
def test_texts_beside_token_ids_are_refused(file: Path, key: str) -> None:
    with pytest.raises(PairError, match=f'unknown key "{key}" beside token ids'):
        read_one(file, TOKEN_IDS | {key: ["x"]})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"history": "hello"}, '"history" must be a list of'),
        ({"history": [["hello"]]}, '"history" must be a list of'),
        ({"history": [["hello", None]]}, '"history" must be a list of'),
        ({"history": [{"role": "human", "content": "x"}]}, "message 0 .*: role 'human' must be one of"),
        ({"system": ["x"]}, '"system" must be a string'),
        ({"tools": "[{"}, '"tools" is a string that is not JSON'),
        ({"tools": ["x"]}, '"tools" must be a list of JSON schemas'),
        ({"tools": {"a": 1}}, '"tools" must be a list of JSON schemas'),
    ],
)
def test_malformed_prompt_columns(file: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(PairError, match=f":1: {words}"):
        read_one(file, SPOT | columns)


# Mistakes. Each line below follows a good first line of its format, so that the message must say :2.


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
