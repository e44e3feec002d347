"""Many requests at once, each reply graded and put on file as it comes. Elicitation and evaluation share it."""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from tqdm import tqdm

from spot_megatron.files import Row
from tools.pairs.batch import BatchClient
from tools.pairs.client import CallFailed, ChatClient, Completion
from tools.pairs.grade import GRADER_VERSION, Verdict
from tools.pairs.pool import FailureStreak, run_pool, token_rate
from tools.pairs.sampling import Key
from tools.pairs.unusable import UnusableStreak


class Questionnaire(Protocol):
    """What is asked, and where the answers go."""

    def request(self, key: Key) -> tuple[dict[str, Any], Row]:
        """The body of one request, and the fields that its record begins with."""

    def unfit(self, completion: Completion) -> Verdict | None:
        """Why a reply is not an answer of the policy in the mode that was asked for, or None."""

    def grade(self, key: Key, completion: Completion, at_once: bool) -> Verdict | None:
        """The verdict; with `at_once` None where it would take long. Called in a thread without `at_once`."""

    def record(self, row: Row) -> None:
        """Put an answer or a failure on file."""

    def is_known_refusal(self, key: Key, reason: str) -> bool:
        """Whether a server that answers others refused this request before; the same refusal does not stop the run."""

    def sync(self) -> None:
        """Flush what is on file."""

    def progress(self) -> dict[str, str]:
        """What the bar shows beside the rate; empty when there is nothing new."""


async def ask_all(
    asked: Questionnaire,
    pending: Iterable[Key],
    client: ChatClient | BatchClient,
    concurrency: int,
    max_failures: int,
    num_graders: int,
    bar: "tqdm[None]",
) -> None:
    """Ask, grade and record everything that is pending. Raises RunFailed, Interrupted or EndpointError."""
    streak, unusable = FailureStreak(max_failures), UnusableStreak(max_failures)
    with bar, ThreadPoolExecutor(num_graders) as threads:

        async def ask(key: Key) -> None:
            number = streak.begin()
            body, record = asked.request(key)
            try:
                completion = await client.complete(body)
            except CallFailed as error:
                if error.reason == "interrupted":
                    return  # still pending
                is_known = error.permanent and asked.is_known_refusal(key, error.reason)
                record |= {"failed": error.reason, "permanent": error.permanent, "detail": error.detail}
                asked.record({**record, "calls": error.calls.num_calls})
                bar.update()
                if not is_known:
                    streak.failed(number, str(error), error.permanent)
                return
            streak.succeeded()
            unfit = asked.unfit(completion)
            if unfit is None:
                unusable.note_usable()  # before its grading, which may wait for a worker
            verdict = unfit or asked.grade(key, completion, at_once=True)
            if verdict is None:
                loop = asyncio.get_running_loop()
                verdict = await loop.run_in_executor(threads, asked.grade, key, completion, False)
            assert verdict is not None
            asked.record(record | answer_fields(completion, verdict))
            bar.update()
            if unfit:
                unusable.note(unfit.reason)
            if shown := asked.progress():
                bar.set_postfix({**shown, **token_rate(bar, client.tokens), **client.faults}, refresh=False)

        await run_pool(iter(pending), ask, concurrency, asked.sync, stop_retrying=client.stop_retrying)
        streak.finish()
        unusable.finish()


def answer_fields(completion: Completion, verdict: Verdict) -> Row:
    """The fields of an answer's record besides its key."""
    token_ids = {} if completion.token_ids is None else {"token_ids": completion.token_ids}
    return {
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        **token_ids,
        **verdict_fields(verdict),
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "endpoint": completion.endpoint,
        "calls": completion.calls.num_calls,
        "seconds": round(completion.seconds, 3),
    }


def verdict_fields(verdict: Verdict) -> Row:
    return {
        "verdict": verdict.verdict,
        "extracted": verdict.extracted,
        "reason": verdict.reason,
        "grader": GRADER_VERSION,
    }
