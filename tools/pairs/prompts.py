"""The prompts of the policy and of the oracle. Changing a text requires a new PROMPT_VERSION."""

from collections.abc import Sequence

from spot_megatron.files import Row

PROMPT_VERSION = "surgical-2"
MARKER_START = "=== CORRECTED STARTED ==="
MARKER_END = "=== CORRECTED ENDED ==="
PROBLEM_BLOCK, SOLUTION_BLOCK, ANSWER_BLOCK = "problem", "student_solution", "final_answer"

# Added to a plain question when the policy is sampled; the oracle's closing line is the same, so that a pair's two
# sides end alike.
ELICIT_SUFFIX = (
    "Reason step by step, and end your solution with this line, in which ANSWER stands for your result:\n"
    r"Therefore, the final answer is: $\boxed{ANSWER}$."
)

_TASK = """\
A student has solved the problem below and went wrong somewhere. Produce the solution that this same student would \
have written with the mistake not made, editing as little of the text as possible.

<problem>
{question}
</problem>

<student_solution>
{response}
</student_solution>
{answer}
Rules of the edit:
1. Find the first wrong step. Everything before it stays exactly as it is, word for word.
2. From there on replace what is wrong and what depends on it, and keep every sentence that is still right. The \
reasoning itself must become correct: putting another number into the last line is not enough.
3. Keep the student's voice: the same vocabulary, notation, layout and level of detail. If the solution breaks off, \
finish it in that voice.
4. The result is the student's own solution. It must not speak of a mistake, a correction, an earlier version, or of \
any answer that was known beforehand.
5. It closes with: Therefore, the final answer is: $\\boxed{{ANSWER}}$.

Put the edited solution, and nothing else, between these two lines. Write each once, alone on its line, exactly so:
{start}
{end}
"""

_KNOWN_ANSWER = """
The problem's true final answer is
<final_answer>
{answer}
</final_answer>
Use it to locate the mistake and to check your edit, but derive it in the text: the student did not know it.
"""

_FEEDBACK = """
Earlier edits of yours were not accepted:
{complaints}
{previous}Avoid all of that this time.
"""

_PREVIOUS = """\
The last of them was:
<previous_edit>
{edit}
</previous_edit>
"""

_COMPLAINTS = {
    "missing_markers": "the two marker lines were missing, repeated or out of order, or there was nothing between them",
    "unfinished_thinking": "the reasoning never came to an end; think more briefly and then write the edit",
    "empty_content": "the reply held no text beside the thinking; think more briefly and then write the edit",
    "content_filter": "the reply was withheld by a content filter; write only the edited solution",
    "cut_off": "the text broke off before its end; think more briefly and write no more than needed",
    "no_answer": r"the edited solution held no complete \boxed{{...}}",
    "wrong_answer": "the edited solution ended in {extracted}, which is not the right final answer",
    "grading_timeout": "the final answer {extracted} could not be checked; write it in a simpler form",
    "answer_only_edit": "only the boxed answer was changed to {extracted}; edit the steps that led to another "
    "result, too",
    "change_ratio": "too much of the text was changed (share of new tokens: {extracted}); keep every sentence that is "
    "right word for word",
    "undecided": "the final answer {extracted} could not be compared; write it in a simpler form",
    "unchanged": "the text was the student's, unchanged",
    "answer_leak": "the text spoke of a correction or of a known answer ({extracted}); let it be the student's own",
}


def elicit_messages(question: str, suffix: str) -> list[Row]:
    """One user turn: the question and, after a blank line, the suffix (none when it is empty)."""
    return [{"role": "user", "content": f"{question}\n\n{suffix}" if suffix else question}]


def rectify_messages(
    question: str,
    response: str,
    answer: str | None,
    failures: Sequence[tuple[str, str]] = (),
    previous: str | None = None,
) -> list[Row]:
    """The oracle's prompt; `answer` None keeps the true answer from it.

    `failures` are the (reason, detail) of the attempts so far, oldest first; `previous` is the latest rejected edit.
    """
    content = _TASK.format(
        question=question,
        response=response,
        answer="" if answer is None else _KNOWN_ANSWER.format(answer=answer),
        start=MARKER_START,
        end=MARKER_END,
    )
    if failures:
        complaints = "\n".join(
            f"- attempt {number}: {_COMPLAINTS[reason].format(extracted=detail)}."
            for number, (reason, detail) in enumerate(failures, start=1)
        )
        shown = "" if previous is None else _PREVIOUS.format(edit=previous)
        content += _FEEDBACK.format(complaints=complaints, previous=shown)
    return [{"role": "user", "content": content}]
