"""JSONL files and journals: nothing malformed is taken for a record, nothing written is lost. About 10 s."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spot_megatron.errors import PairError
from spot_megatron.files import AtomicWriter, dump_line, read_rows, text_field, write_rows
from tests.tools.pairs.support import ENVIRONMENT, ROOT
from tools.pairs.attempts import fingerprint
from tools.pairs.elicit import Elicitation
from tools.pairs.filter import read_candidate
from tools.pairs.human import HumanEdit, export_errors, read_edits
from tools.pairs.journal import Journal, read_records
from tools.pairs.limits import Prices
from tools.pairs.oracle import ErrorFile, Oracle
from tools.pairs.questions import Question, QuestionSet, read_questions
from tools.pairs.rectify import Rectification
from tools.pairs.sampling import Sampling

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)
ROW = st.dictionaries(TEXT, JSON, max_size=5)
HOSTILE_LINES = [
    b'{"a": 1',
    b'{"a": NaN}',
    b'{"a": Infinity}',
    b'{"a": 1e999}',
    b"[1, 2]",
    b'"text"',
    b"null",
    b"\xff\xfe{}",
    b'{"a": "\\ud800"}',
    b'{"a": 1, "a": 2}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 100_000,
    b'{"a": 1}{"b": 2}',
    b'\x00{"a": 1}',
    b'{"a": "\x01"}',
]
READERS = {
    "rows": lambda path: list(read_rows(path)),
    "questions": read_questions,
    "errors": ErrorFile,
    "rectified": lambda path: [read_candidate(row, f"{path}:{number}") for number, row in read_rows(path)],
    "journal": lambda path: Journal(path, {}).close(),
    "records": lambda path: list(read_records(path)),
    "human": lambda path: list(read_edits(path)),
    "elicitation": lambda path: resume_elicitation(path),
    "rectification": lambda path: resume_rectification(path),
}


def resume_elicitation(path):
    """The fuzzed file as a journal of answers."""
    path.rename(path.with_name("responses.jsonl"))
    questions = QuestionSet([Question(str(number), f"q{number}", "1") for number in range(3)])
    try:
        elicitation = Elicitation(path.parent, questions, Sampling("m"), 1)
    except PairError as error:
        raise PairError(str(error).replace("responses.jsonl", path.name)) from None
    elicitation.write_outputs(())
    elicitation.journal.close()


def resume_rectification(path):
    """The fuzzed file as a journal of attempts."""
    path.rename(path.with_name("journal.jsonl"))
    errors = {str(number): {"id": str(number), "response": "r", "answer": "1"} for number in range(3)}
    try:
        rectification = Rectification(path.parent, errors, Oracle("m"), 3, Prices())
    except PairError as error:
        raise PairError(str(error).replace("journal.jsonl", path.name)) from None
    rectification.write_outputs()
    rectification.journal.close()


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=lambda line: repr(line[:20]))
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"a": 0}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(PairError, match=":2: ") as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    with pytest.raises(PairError, match=":2: "):
        list(read_records(path))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROW, max_size=6), blank=st.sampled_from([b"", b"\n", b"  \r\n"]))
def test_what_is_written_is_read_back(tmp_path_factory, rows, blank):
    path = tmp_path_factory.mktemp("files") / "file.jsonl"
    assert write_rows(path, rows) == len(rows)
    assert [row for _, row in read_rows(path)] == rows
    path.write_bytes(b"\xef\xbb\xbf" + blank.join(dump_line(row) for row in rows))
    assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_reader_crashes_without_a_clear_error(tmp_path_factory, reader, data):
    """Random bytes, and valid lines of which one is cut, changed or replaced."""
    path = tmp_path_factory.mktemp("fuzz") / "file.jsonl"
    good = {"id": "a", "question": "q", "answer": "1", "response": "r", "corrected": "c", "prompt": "q"}
    good |= {"sample": 0, "finish_reason": "stop", "verdict": "wrong", "reason": "no_box", "outcome": "rejected"}
    good |= {"attempt": 1, "original": fingerprint("r"), "oracle": "m", "detail": ""}
    lines = [dump_line({**good, "id": str(number), "question": f"q{number}"}) for number in range(3)]
    kind = data.draw(st.sampled_from(["bytes", "cut", "flip", "row", "hostile"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=200))
    elif kind == "cut":
        content = b"".join(lines)[: data.draw(st.integers(0, 300))]
    elif kind == "flip":
        raw = bytearray(b"".join(lines))
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(raw)
    elif kind == "row":
        changed = {**good, data.draw(st.sampled_from(sorted(good))): data.draw(JSON)}
        content = b"".join([lines[0], dump_line(changed), lines[2]])
    else:
        content = b"".join([lines[0], data.draw(st.sampled_from(HOSTILE_LINES)), b"\n"])
    path.write_bytes(content)
    message = None
    try:
        READERS[reader](path)
    except PairError as error:
        message = str(error)
    assert message is None or str(path) in message


def test_a_missing_file_and_a_wrong_field_are_named(tmp_path):
    with pytest.raises(PairError, match="cannot be read"):
        list(read_rows(tmp_path / "none.jsonl"))
    with pytest.raises(PairError, match="`answer` is missing"):
        text_field({}, "answer", "here")
    with pytest.raises(PairError, match="`answer` is a number"):
        text_field({"answer": 3}, "answer", "here")


def test_an_atomic_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.jsonl"
    write_rows(path, [{"old": 1}])
    with pytest.raises(ValueError), AtomicWriter(path) as writer:
        writer.write(dump_line({"new": 1}) + dump_line({"new": float("nan")}))
    assert [row for _, row in read_rows(path)] == [{"old": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(file):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_rows(tmp_path / "out.jsonl", [{"new": 1}])
    assert list(tmp_path.iterdir()) == []


def test_a_journal_cut_anywhere_keeps_every_whole_record(tmp_path):
    """A kill can end the file after any byte; a number that is cut is still valid JSON, and must not count."""
    records = [{"id": str(number), "text": "é\n" * number, "n": 1234567} for number in range(4)]
    lines = [dump_line(record) for record in records]
    whole = b"".join(lines)
    path = tmp_path / "journal.jsonl"
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        num_complete = whole[:end].count(b"\n")
        assert [record for _, record in read_records(path)] == records[:num_complete]
        with Journal(path, {}) as journal:
            assert journal.num_torn_bytes == end - len(b"".join(lines[:num_complete]))
            offset = journal.append({"id": "next"})
            assert journal.read_at(offset) == {"id": "next"}
            assert [record for _, record in journal.records()] == [*records[:num_complete], {"id": "next"}]


def test_a_changed_record_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, {}) as journal:
        for number in range(3):
            journal.append({"id": str(number), "response": "7 apples", "n": 1})
    content = path.read_bytes()
    assert [record for _, record in read_records(path)][1] == {"id": "1", "response": "7 apples", "n": 1}
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            if place == len(content) - 1:  # the newline: the record does not count
                assert len(list(read_records(path))) == 2
                continue
            with pytest.raises(PairError, match=r"journal.jsonl:\d"):
                list(read_records(path))


def test_a_second_process_is_told_who_holds_the_journal(tmp_path):
    with Journal(tmp_path / "journal.jsonl", {}):
        program = "import sys, pathlib; from tools.pairs.journal import Journal; Journal(pathlib.Path(sys.argv[1]), {})"
        command = [sys.executable, "-c", program, str(tmp_path / "journal.jsonl")]
        result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert f"process {os.getpid()}" in result.stderr
    assert "already writing here" in result.stderr
    Journal(tmp_path / "journal.jsonl", {}).close()  # the lock goes with its holder


def test_other_settings_are_refused_with_both_values(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"temperature": 0.7}).close()
    with Journal(path, {"temperature": 0.5}) as journal:  # nothing recorded yet: the settings may still change
        journal.append({"id": "a"})
    with pytest.raises(PairError, match=r"temperature: 0\.5 then, 0\.9 now"):
        Journal(path, {"temperature": 0.9})
    Journal(path, {"temperature": 0.5}).close()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with Journal(tmp_path / "journal.jsonl", {}) as journal:
        journal.append({"id": "a"})
        real_write = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, line: real_write(file, line[: len(line) // 2]))
            with pytest.raises(OSError, match="disk full"):
                journal.append({"id": "b" * 100})
        journal.append({"id": "c"})
        assert [record["id"] for _, record in journal.records()] == ["a", "c"]


LINES = st.lists(
    TEXT | st.sampled_from(["##### error x", "=== CORRECTED STARTED ===", "=== CORRECTED ENDED ===", "\\", "\\\\"])
)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(LINES.map("\n".join), min_size=1, max_size=3))
def test_the_human_file_gives_back_every_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("human") / "edit.md"
    errors = [
        {"id": f"q {number}", "question": text, "answer": text, "response": text} for number, text in enumerate(texts)
    ]
    assert export_errors(path, errors, with_answer=True) == len(texts)
    assert [(edit.id, edit.text) for edit in read_edits(path)] == [(error["id"], error["response"]) for error in errors]


def test_a_damaged_human_file_is_refused_at_the_right_line(tmp_path):
    path = tmp_path / "edit.md"
    export_errors(path, [{"id": "a", "question": "q", "answer": "1", "response": "r"}], with_answer=False)
    lines = path.read_text().split("\n")
    marker = lines.index("=== CORRECTED ENDED ===")
    path.write_text("\n".join(lines[:marker]))
    with pytest.raises(PairError, match="ends before '=== CORRECTED ENDED ==='"):
        list(read_edits(path))
    path.write_text("\n".join([*lines[: marker - 2], *lines[marker - 1 :]]))
    with pytest.raises(PairError, match=rf":{marker}: found '=== CORRECTED ENDED ==='"):
        list(read_edits(path))
    path.write_bytes("\r\n".join(lines).encode())
    assert list(read_edits(path)) == [HumanEdit("a", "r\r", marker + 1)]
    assert json.dumps(next(iter(read_edits(path))).text) == '"r\\r"'
