"""Reading the oracle's replies. About 1 s."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.pairs.support import an_error
from tools.pairs.answers import contradiction, is_answer_only, judge_edit, parse_edit
from tools.pairs.grade import shared_grader
from tools.pairs.leaks import find_leak
from tools.pairs.prompts import _COMPLAINTS, MARKER_END, MARKER_START, rectify_messages

GOOD = f"{MARKER_START}\nstep 1\n\nstep 2\n{MARKER_END}"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (GOOD, "step 1\n\nstep 2"),
        (f"Sure!\n  {MARKER_START}  \n  indented\n{MARKER_END}\nDone.", "  indented"),
        (f"<think>{GOOD}\n{MARKER_START}</think>\n{GOOD}", "step 1\n\nstep 2"),
        (f"<think>a</think> b </think>\n{GOOD}", "step 1\n\nstep 2"),
        (GOOD.replace("\n", "\r\n"), "step 1\n\nstep 2"),
    ],
)
def test_the_text_between_the_markers(reply, text):
    assert parse_edit(reply, "stop").text == text


@pytest.mark.parametrize(
    ("reply", "finish", "reason"),
    [
        ("step 1", "stop", "missing_markers"),
        (f"{MARKER_START}\nstep 1", "stop", "missing_markers"),
        (f"step 1\n{MARKER_END}", "stop", "missing_markers"),
        (f"{MARKER_END}\nstep\n{MARKER_START}", "stop", "missing_markers"),
        (f"{GOOD}\n{GOOD}", "stop", "missing_markers"),
        (f"{MARKER_START}\n \n{MARKER_END}", "stop", "missing_markers"),
        (f"{MARKER_START} step 1 {MARKER_END}", "stop", "missing_markers"),
        (f"<think>{GOOD}", "stop", "unfinished_thinking"),
        (GOOD, "length", "cut_off"),
    ],
)
def test_anything_else_is_rejected_with_its_reason(reply, finish, reason):
    edit = parse_edit(reply, finish)
    assert (edit.text, edit.reason) == (None, reason)


@given(st.text(), st.sampled_from(["stop", "length", "unknown"]))
def test_no_reply_crashes_the_parser(reply, finish):
    for text in (reply, f"{MARKER_START}\n{reply}\n{MARKER_END}"):
        edit = parse_edit(text, finish)
        assert (edit.text is None) == bool(edit.reason)


@pytest.mark.parametrize(
    "text",
    [
        "The reference answer says 5.",
        "As the given answer is 5, we stop.",
        "This matches the correct answer.",
        "The student's solution was wrong.",
        "Here is the corrected version:",
        "In the original solution, 3 was used.",
        "I made an error above.",
        "The mistake was in step 2.",
        "The ground truth is 5.",
        "In the revised solution",
        "Wait, that was wrong.",
        "Wait, no: 3 times 4 is 12.",
        "Oops, I multiplied and this is incorrect.",
        "Since we know the result must be 5, x = 2.",
        "We know that the answer is 5.",
        "The answer is supposed to be 5.",
        "To get the correct answer, take 3.",
        "That was a mistake.",
        "Let me correct this step.",
        "I miscalculated the sum.",
        "There is an error in my calculation.",
        "Use 3 instead of the wrong 4.",
        "My first attempt gave 4.",
        "The true answer is 5.",
        "It agrees with the official solution.",
    ],
)
def test_leaks_are_found_unless_the_student_wrote_so(text):
    leak = find_leak(text, "so x = 5", "Find x.")
    assert leak
    assert find_leak(text, f"he said: {text}", "Find x.") is None


@pytest.mark.parametrize(
    "text",
    [
        "Therefore, the final answer is: $\\boxed{5}$.",
        "We are given that the answer key opens 3 doors"[:30],
        "The error term of the series is small.",
        "Given the solution set, we count.",
        "The original price was 5, the previous term is 3.",
        "The first solution is x=2, the second x=3.",
        "The above solution holds for all n.",
        "The known solution of the equation is sin x.",
        "By a known result of Euler, the sum is 2.",
        "The error is at most 0.01.",
        "The error in the approximation is small.",
        "The previous solution x=2 gives y=4.",
        "The given solution passes through (0, 1).",
        "Suppose n is odd; this is wrong, since n^2 would be even.",
        "Wait times are 3 and 5 minutes.",
        "We know that the sum is 5.",
        "The correct choice is (B).",
    ],
)
def test_ordinary_mathematics_is_no_leak(text):
    assert find_leak(text) is None


@pytest.mark.parametrize(
    ("edited", "outcome", "reason"),
    [
        (r"here 4*2=8. then 7*9=63. the answer is \boxed{8,63}.", "verified", None),
        ("here  4*2=8.\nthen 7*9=65. the answer is \\boxed{8,65}.", "rejected", "unchanged"),
        (r"here 4*2=8. then 7*9=64. the answer is \boxed{8,64}.", "rejected", "wrong_answer"),
        ("here 4*2=8. then 7*9=63.", "rejected", "no_answer"),
        (r"the reference answer: \boxed{8,63}", "rejected", "answer_leak"),
        (r"here 4*2=8. then 7*9=65. the answer is \boxed{8,63}.", "rejected", "answer_only_edit"),
    ],
)
def test_edits_are_judged(edited, outcome, reason):
    judged = judge_edit(an_error(), edited, shared_grader())
    assert (judged["outcome"], judged.get("reason")) == (outcome, reason)
    assert reason is None or reason in _COMPLAINTS


@pytest.mark.parametrize(
    ("original", "edited", "answer_only"),
    [
        (r"The sum is 66. \boxed{66}", r"The sum is 66. \boxed{65}", True),
        (r"The sum is 66. \boxed{66}", r"The sum is 65. \boxed{65}", False),
        (r"So $\boxed{\frac{1}{2}}$, as \boxed{3}", r"So $\boxed{\frac{1}{3}}$, as  \boxed{4}", True),
        ("The sum is 66", r"The sum is 66. Therefore, the final answer is: $\boxed{65}$.", True),
        ("The sum is 66", r"The sum is 65. Therefore, the final answer is: $\boxed{65}$.", False),
        (r"1 \boxed{2", r"1 \boxed{3", True),
        (r"1 \boxed{2 \boxed{2", r"1 \boxed{3 \boxed{3", True),
        (r"1 \boxed{\{2\}, \text{\}}2}", r"1 \boxed{\{2\}, \text{\}}3}", True),
        (r"1 \boxed 2", r"1 \boxed 3", True),
        (r"1 \framebox{2}", r"1 \framebox{3}", True),
        (r"1 \boxed{2", r"2 \boxed{2", False),
    ],
)
def test_an_edit_of_the_box_alone_is_none_of_the_reasoning(original, edited, answer_only):
    assert is_answer_only(edited, original) == answer_only


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (r"The sum is 66. \boxed{65}", "66"),
        (r"2+3=5, so $4+2 = 6$. \boxed{5}", "6"),
        (r"The sum is 65. \boxed{65}", None),
        (r"x = 1/2, hence \boxed{0.5}", None),
        (r"It is 1,000. \boxed{1000}", None),
        (r"It is 3x. \boxed{4}", None),
        (r"It is 3. \boxed{x+1}", None),
        ("It is 3.", None),
    ],
)
def test_a_box_that_contradicts_the_text_is_noticed(text, stated):
    assert contradiction(text) == stated


RULES = (
    r"1\. Find the first wrong step\. Everything before it stays exactly as it is, word for word\.",
    r"2\. From there on replace what is wrong and what depends on it, .* the last line is not enough\.",
    r"3\. Keep the student's voice: the same vocabulary, .* finish it in that voice\.",
    r"4\. The result is the student's own solution\. It must not speak of a mistake, .* known beforehand\.",
    r"5\. It closes with: Therefore, the final answer is: \$\\boxed\{ANSWER\}\$\.",
    r"Put the edited solution, and nothing else, between these two lines\. Write each once, alone on its line, .*:",
)


def test_the_prompt_holds_every_rule_of_the_edit():
    lines = rectify_messages("Q", "R", None)[0]["content"].split("\n")
    for rule in RULES:
        assert sum(re.fullmatch(rule, line) is not None for line in lines) == 1, rule
    assert "derive it in the text" in rectify_messages("Q", "R", "42")[0]["content"]


def test_a_retry_shows_the_edit_that_was_not_accepted():
    content = rectify_messages("Q", "R", None, [("change_ratio", "0.80; at most 0.6")], "my {edit}")[0]["content"]
    assert "<previous_edit>\nmy {edit}\n</previous_edit>" in content
    assert "0.80; at most 0.6" in content


def test_the_prompt_names_markers_and_tells_no_more_than_it_should():
    plain = rectify_messages("Q {x}", "R {y}", None)[0]["content"]
    assert f"\n{MARKER_START}\n{MARKER_END}\n" in plain
    assert "Q {x}" in plain
    assert "R {y}" in plain
    assert "final_answer>" not in plain
    assert "<final_answer>\n42\n</final_answer>" in rectify_messages("Q", "R", "42")[0]["content"]
    failures = [(reason, f"detail-{reason}") for reason in _COMPLAINTS]
    hinted = rectify_messages("Q", "R", None, failures)[0]["content"]
    assert hinted.count("- attempt ") == len(failures)
    assert "detail-wrong_answer" in hinted
    assert "{" not in hinted.split("Earlier edits")[1].replace(r"\boxed{...}", "")
