"""Pair files: every format, and the columns besides its own. Takes about 2 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from spot_megatron.data.prompts import REFUSED_COLUMNS
from spot_megatron.data.records import Format, Pair, TokenPair, read_pairs
from spot_megatron.errors import PairError
from tests.data.rows import FIVE, FOUR, SPOT, TOKEN_IDS, TRL, USER, VISUAL, write


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


def test_one_text_part_is_its_text(tmp_path):
    """Elicitation sends such prompts, and its pairs keep them."""
    file = tmp_path / "pairs.jsonl"
    part = {"type": "text", "text": "q"}
    row = {"chosen": "a", "rejected": "b"}
    file.write_text(json.dumps({**row, "prompt": [{"role": "user", "content": [part]}]}))
    (pair,) = read_pairs([file])
    assert pair.prompt == [{"role": "user", "content": "q"}]
    for parts in ([part, part], [], [{"type": "image_url"}]):
        file.write_text(json.dumps({**row, "prompt": [{"role": "user", "content": parts}]}))
        with pytest.raises(PairError, match="several parts are not supported"):
            list(read_pairs([file]))
