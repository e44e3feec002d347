"""Whether a response's final answer is right. One function for sampled answers, rectified answers and evaluation.

A right answer must never be called wrong: the policy would be trained against it. So this stage confirms what is the
same text, and confirms or rejects plain numbers. All else goes to a child process that is killed at a time limit, which
takes lists, intervals, units and matrices apart and asks math-verify for the rest. What it can neither confirm nor
disprove is `undecided`.
"""

import atexit
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.pairs import boxes, math_text

CORRECT, WRONG, NO_ANSWER, TIMEOUT, UNDECIDED = "correct", "wrong", "no_answer", "timeout", "undecided"
GRADER_VERSION = (
    2  # raised by every change that can change a verdict; `tools.elicit --regrade` brings a folder up to it
)
LONGEST_ANSWER = 2_000  # characters; a longer answer is right only when it is the same text
LONGEST_PHRASE = 12  # words of a known answer
TIME_LIMIT = 5.0  # seconds of CPU for one comparison; math_worker.CLOCK_LIMIT times that on the clock


@dataclass(frozen=True)
class Verdict:
    """`verdict` is correct, wrong, no_answer, timeout or undecided; `reason` says how it was reached; `extracted` is
    the content of the final box, or of the final boxes joined by ", ".

    Reasons: correct: same_text, same_number, same_mathematics. wrong: another_number, another_answer. no_answer:
    no_box, unclosed_box, empty_box, unfinished_thinking, cut_off. timeout: time_limit, memory_limit. undecided:
    rounded (a decimal that may be a rounding of the other), not_proved, parser_failed, too_long, several_boxes.
    """

    verdict: str
    extracted: str | None
    reason: str


Outcome = tuple[str, str]  # verdict, reason
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_SURE = {
    math_text.EQUAL: (CORRECT, "same_mathematics"),
    math_text.DIFFERENT: (WRONG, "another_answer"),
    math_text.UNKNOWN: (UNDECIDED, "not_proved"),
}


def grade(response: str, answer: str, finish_reason: str | None = None) -> Verdict:
    """Grade with the shared pool; thread-safe. `finish_reason` "length" makes no_answer's reason cut_off."""
    return shared_grader().grade(response, answer, finish_reason)


def extract(response: str, finish_reason: str | None = None) -> tuple[list[str], str]:
    """(contents of the final boxes, "") or ([], reason). A thinking block's own boxes are not answers."""
    _, separator, text = response.rpartition("</think>")
    if not separator and "<think>" in response:
        return [], "cut_off" if finish_reason == "length" else "unfinished_thinking"
    contents, reason = boxes.final_boxes(text)
    return contents, "" if contents else "cut_off" if finish_reason == "length" and reason != "empty_box" else reason


def clean_gold(answer: str) -> str:
    """A known answer is often a whole solution that ends in a box, or in several."""
    contents, _ = boxes.final_boxes(answer)
    return math_text.clean(", ".join(contents) if contents else answer)


def unusable_gold(answer: str) -> str | None:
    """Why no response could match this known answer, or None: it "is empty", "is prose without a box", ..."""
    text = clean_gold(answer)
    if "boxed" in answer and not boxes.final_boxes(answer)[0]:
        return r"has a \boxed{} that never closes or holds nothing"
    if not text:
        return "is empty"
    if text.lower() in ("nan", "null", "n/a", "na", "undefined value"):
        return f"is {text!r}, which marks a missing value"
    if len(text) > LONGEST_ANSWER:
        return f"has {len(text):,} characters, and at most {LONGEST_ANSWER:,} are compared"
    if len(_PROSE.findall(text)) > LONGEST_PHRASE:
        return f"is prose ({len(_PROSE.findall(text))} words) without a box"
    return None


def compare_at_once(gold: str, given: str) -> Outcome | None:
    """(verdict, reason) of two cleaned answers that are the same text or plain numbers, else None."""
    if math_text.squeeze(gold) == math_text.squeeze(given) and gold:
        return CORRECT, "same_text"
    if max(len(gold), len(given)) > LONGEST_ANSWER:
        return UNDECIDED, "too_long"
    numbers = math_text.number(gold), math_text.number(given)
    if numbers[0] is None or numbers[1] is None:
        return None
    outcome = math_text.compare_numbers(numbers[0], numbers[1])
    if outcome == math_text.DIFFERENT:
        other = math_text.continental(gold), math_text.continental(given)
        if any(a and a.value == b.value for a, b in zip(other, (numbers[1], numbers[0]), strict=True)):
            outcome = math_text.UNKNOWN
    return {
        math_text.EQUAL: (CORRECT, "same_number"),
        math_text.DIFFERENT: (WRONG, "another_number"),
        math_text.UNKNOWN: (UNDECIDED, "rounded"),
    }[outcome]


class Grader:
    """A pool of worker processes, started when first needed, and a cache of what they decided."""

    def __init__(self, num_workers: int = 1, time_limit: float = TIME_LIMIT, cache_size: int = 100_000) -> None:
        self.num_workers = num_workers
        self._time_limit = time_limit
        self._cache: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self._cache_size = cache_size
        self._cache_lock = threading.Lock()
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._workers.put(_Worker(time_limit))
        atexit.register(self.close)

    def grade(self, response: str, answer: str, finish_reason: str | None = None) -> Verdict:
        """As the module's `grade`. Blocks while every worker is busy."""
        verdict = self._grade(response, answer, finish_reason, self._ask_worker)
        assert verdict is not None
        return verdict

    def grade_at_once(self, response: str, answer: str, finish_reason: str | None = None) -> Verdict | None:
        """The verdict where no worker is needed, in microseconds; None where one is."""
        return self._grade(response, answer, finish_reason, lambda *key: self._cache.get(key))

    def _grade(
        self, response: str, answer: str, finish_reason: str | None, ask: Callable[[str, str], Outcome | None]
    ) -> Verdict | None:
        contents, reason = extract(response, finish_reason)
        if not contents:
            return Verdict(NO_ANSWER, None, reason)
        gold, joined = clean_gold(answer), ", ".join(contents)
        if len(contents) == 1:
            outcome = _compare(gold, joined, ask)
            return outcome and Verdict(outcome[0], joined, outcome[1])
        # \boxed{2} and \boxed{3} are one list, unless each of them spells the same answer
        single = [_compare(gold, content, ask) for content in contents]
        together = _compare(gold, joined, ask)
        if together is None or None in single:
            return None
        if together[0] != CORRECT and all(outcome and outcome[0] == CORRECT for outcome in single):
            together = single[-1]
        elif together[0] == WRONG and any(outcome and outcome[0] != WRONG for outcome in single):
            together = (UNDECIDED, "several_boxes")
        return together and Verdict(together[0], joined, together[1])

    def _ask_worker(self, gold: str, given: str) -> Outcome:
        known = self._cache.get((gold, given))
        if known:
            return known
        worker = self._workers.get()
        try:
            outcome = worker.compare(gold, given)
        finally:
            self._workers.put(worker)
        with self._cache_lock:
            self._cache[gold, given] = outcome
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return outcome

    def close(self) -> None:
        """End the worker processes; the next comparison starts them again."""
        workers = []
        while not self._workers.empty():
            workers.append(self._workers.get())
        for worker in workers:
            worker.close()
            self._workers.put(worker)


def _compare(gold: str, content: str, ask: Callable[[str, str], Outcome | None]) -> Outcome | None:
    given = math_text.clean(content)
    return compare_at_once(gold, given) or ask(gold, given)


class _Worker:
    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None

    def compare(self, gold: str, given: str) -> tuple[str, str]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps([gold, given]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:  # killed by its timer, or by the memory limit
            status = self._process.wait()
            self.close()
            return TIMEOUT, "time_limit" if -status in _TIMER_SIGNALS else "memory_limit"
        answer = json.loads(line)
        if answer.get("error") == "MemoryError":
            return TIMEOUT, "memory_limit"
        return (UNDECIDED, "parser_failed") if "error" in answer else _SURE[answer["outcome"]]

    def _start(self) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "tools.pairs.math_worker", str(self._time_limit)]
        places = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
        process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert process.stdout
        if not process.stdout.readline():
            raise RuntimeError(
                f"the grading worker did not start (exit status {process.wait()}); see the message above"
            )
        return process

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None


_TIMER_SIGNALS = (14, 27)  # SIGALRM, SIGPROF
_shared: Grader | None = None
_shared_lock = threading.Lock()


def shared_grader() -> Grader:
    """The process-wide grader with one worker."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Grader()
        return _shared
