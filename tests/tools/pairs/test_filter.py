"""The filter: the exact change ratio, every reason to drop, and the pair file that the trainer reads. About 5 s."""

import difflib
import random
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from spot_megatron.data.records import read_pairs
from spot_megatron.errors import PairError
from spot_megatron.files import Row, write_rows
from tests.tools.pairs.support import ASSETS, an_error, rows, run
from tools.pairs.filter import Drop, Keep, PairFilter, Rules
from tools.pairs.grade import shared_grader
from tools.pairs.measures import load_tokenizer, measure

RIGHT = r"here 4*2=8. then 7*9=63. the answer is \boxed{8,63}."
IDS = st.lists(st.integers(0, 5), max_size=25)


def rectified(identifier: str, corrected: str = RIGHT, **changes: object) -> Row:
    return an_error(identifier, corrected=corrected, **changes)


def decide(*table: Row, **rules) -> list[Keep | Drop]:
    tokenizer = load_tokenizer(str(ASSETS))
    return list(PairFilter(Rules(**rules), tokenizer, shared_grader()).run(enumerate(table, start=1), ASSETS))


@given(IDS.filter(bool), IDS)
def test_the_common_subsequence_is_exact(chosen, rejected):
    @cache
    def longest(i: int, j: int) -> int:
        if i == len(chosen) or j == len(rejected):
            return 0
        if chosen[i] == rejected[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    measures = measure(1, chosen, rejected)
    assert measures.common_tokens == longest(0, 0)
    assert measures.change_ratio == pytest.approx(1 - longest(0, 0) / len(chosen))
    prefix = measures.shared_prefix_tokens
    assert chosen[:prefix] == rejected[:prefix]
    assert prefix == min(len(chosen), len(rejected)) or chosen[prefix] != rejected[prefix]


def test_it_is_far_faster_than_difflib():
    """The benchmark has the full numbers; this guards against a change of algorithm."""
    rng = random.Random(0)
    pairs = []
    for _ in range(8):
        rejected = [min(151_000, int(rng.paretovariate(0.6))) for _ in range(2500)]
        chosen = list(rejected)
        start = rng.randrange(1500)
        chosen[start : start + 700] = [min(151_000, int(rng.paretovariate(0.6))) for _ in range(700)]
        pairs.append((chosen, rejected))
    started = time.process_time()
    ours = [measure(1, *pair) for pair in pairs]
    ours_seconds, started = time.process_time() - started, time.process_time()
    for pair, measures in zip(pairs, ours, strict=True):
        matched = sum(
            block.size for block in difflib.SequenceMatcher(None, *pair, autojunk=False).get_matching_blocks()
        )
        assert matched <= measures.common_tokens
    assert time.process_time() - started > 15 * ours_seconds


@pytest.mark.parametrize(
    ("row", "rules", "reason"),
    [
        (rectified("a"), {}, None),
        (rectified("a"), {"gamma": 0.01}, "change_ratio"),
        (rectified("a"), {"gamma": 1.0}, None),
        (rectified("a", corrected=""), {}, "empty_side"),
        (rectified("a", response=""), {}, "empty_side"),
        (rectified("a", finish_reason="content_filter"), {}, "unknown_finish"),
        (rectified("a", finish_reason="length"), {}, None),
        (rectified("a", corrected=RIGHT.replace("63", "64")), {}, "not_verified"),
        (rectified("a", corrected=RIGHT.replace("63", "64")), {"verify": False}, None),
        (rectified("a", corrected="As the reference answer says: " + RIGHT), {}, "answer_leak"),
        (rectified("a", corrected=RIGHT, response=RIGHT.replace("8,63", "8,64")), {}, "answer_only_edit"),
        (rectified("a"), {"max_tokens": 30}, "too_long"),
        (rectified("a", response=RIGHT.replace(" ", "  ")), {}, "near_empty_edit"),
        (rectified("a"), {"min_edit_tokens": 5}, "near_empty_edit"),
        (rectified("a"), {"min_edit_tokens": 4}, None),
    ],
)
def test_every_reason(row, rules, reason):
    (decision,) = decide(row, **rules)
    assert (decision.reason if isinstance(decision, Drop) else None) == reason


def test_lengths_include_the_templates_tokens_and_ignore_saved_padding(tmp_path):
    """A tokenizer.json keeps the truncation and padding that its last user set."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    plain = [encoding.ids for encoding in tokenizer.encode_batch([RIGHT, "4"], add_special_tokens=False)]
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(max_length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode([RIGHT, "4"]) == plain
    whole = load_tokenizer(str(ASSETS))
    text = whole.prompt_text([{"role": "user", "content": "4*2"}], None, "4*2")
    assert text.endswith("<think>\n\n</think>\n\n")
    (kept,) = decide(rectified("a"))
    assert kept.measures.prompt_tokens > len(tokenizer.encode("4*2, 7*9", add_special_tokens=False).ids)


def test_a_contradicted_box_is_flagged():
    text = "here 6*7=42. then 41 it is: the sum is 40. \\boxed{42}"
    (kept,) = decide(rectified("a", question="6*7", answer="42", response="x", corrected=text), gamma=1.0)
    assert kept.row["meta"]["inconsistent"] == "40"
    (kept,) = decide(rectified("a"))
    assert "inconsistent" not in kept.row["meta"]


def test_duplicates_are_dropped_and_repeated_ids_refused():
    decisions = decide(rectified("a"), rectified("b"), rectified("c", response=RIGHT.replace("63", "66")))
    assert [getattr(decision, "reason", "kept") for decision in decisions] == ["kept", "duplicate", "kept"]
    with pytest.raises(PairError, match="'a' occurs twice"):
        decide(rectified("a"), rectified("a"))


def test_the_change_ratio_is_the_papers():
    """One of the chosen side's tokens is new: R = 1/|chosen|; removals alone leave R at 0."""
    assert measure(1, [1, 2, 3, 4], [1, 9, 3, 4]).change_ratio == 0.25
    assert measure(1, [1, 2, 3, 4], [1, 2, 2, 3, 4]).change_ratio == 0.0
    assert measure(1, [1, 2, 3, 4], [1, 2, 2, 3, 4]).edited_tokens == 1


@pytest.mark.parametrize("prompt", [None, "4*2, 7*9", [{"role": "user", "content": "4*2, 7*9"}]])
def test_the_program_writes_what_the_trainer_reads(tmp_path, prompt):
    table = [rectified(f"q{n}", corrected=RIGHT.replace("then", w)) for n, w in enumerate(("then", "next", "and"))]
    table += [rectified("bad", corrected=RIGHT.replace("63", "64")), rectified("ids", token_ids=[3, 1, 4], sample=1)]
    table[-1]["corrected"] = RIGHT.replace("then", "also")
    table[0]["finish_reason"] = "length"
    for row in table:
        row |= {"prompt": prompt} if prompt else {}
    write_rows(tmp_path / "rectified.jsonl", table)
    output = tmp_path / "pairs.jsonl"
    options = ("--rectified", tmp_path / "rectified.jsonl", "--tokenizer", ASSETS, "--output", output)
    result = run("pairs", *options)
    pairs = read_pairs([output])
    assert [pair.id for pair in pairs] == ["q0", "q1", "q2", "ids"]
    assert pairs[0].rejected_finish == "length"
    assert pairs[-1].rejected_ids == [3, 1, 4]
    assert pairs[0].prompt == (prompt or "4*2, 7*9")
    assert 0 < pairs[0].meta["change_ratio"] < 0.6
    assert [(row["id"], row["reason"]) for row in rows(tmp_path / "pairs.dropped.jsonl")] == [("bad", "not_verified")]
    assert "not_verified 1" in result.stdout


def test_wrong_use_is_refused(tmp_path):
    write_rows(tmp_path / "rectified.jsonl", [rectified("a")])
    options = ("--rectified", tmp_path / "rectified.jsonl", "--output", tmp_path / "pairs.jsonl")
    result = run("pairs", *options, "--tokenizer", ASSETS, "--gamma", "6", check=False)
    assert (result.returncode, "--gamma" in result.stderr) == (2, True)
    result = run("pairs", *options, "--tokenizer", tmp_path, check=False)
    assert (result.returncode, "no tokenizer there" in result.stderr) == (2, True)
    assert not (tmp_path / "pairs.jsonl").exists()
