"""Stage 2: have the oracle edit each wrong answer until the grader accepts it, within a budget."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from spot_megatron.errors import UserError
from spot_megatron.files import Row
from tools.pairs.answers import judge_edit, parse_edit, rejected
from tools.pairs.attempts import Attempts
from tools.pairs.batch import BatchClient
from tools.pairs.client import CallFailed, ChatClient, Completion, most_tokens
from tools.pairs.grade import Grader
from tools.pairs.limits import Budget, Payment, Places
from tools.pairs.pool import DRAIN_SECONDS, FailureStreak, Interrupted, RunFailed, progress_bar, run_pool, token_rate


class Rectification(Attempts):
    """Attempts every open error of an output folder."""

    async def run(
        self,
        client: ChatClient | BatchClient,
        grader: Grader,
        concurrency: int,
        max_failures: int,
        target: int | None = None,
        budget_usd: float | None = None,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        """Attempt every open error until it is verified or out of attempts; stop at the target or the budget."""
        budget = Budget(budget_usd, self.spent_usd)
        places = Places(target, lambda: self.num_verified)
        streak = FailureStreak(max_failures)
        pending = list(self.open_errors())

        with (
            progress_bar("rectify", len(self.errors), len(self.errors) - len(pending), "error") as bar,
            ThreadPoolExecutor(grader.num_workers) as threads,
        ):

            async def rectify(identifier: str) -> None:
                progress = self.progress[identifier]
                while progress.verified_at is None and len(progress.failures) < self.attempts:
                    body = self.request(identifier, progress)
                    payment = budget.payment(self.prices.cost(*most_tokens(body)))
                    if self.stopped == "budget_spent" or not await payment.wait():
                        self.stopped = "budget_spent"
                        return  # what is under way is paid for, and is finished
                    number, known = streak.begin(), self.known_refusal(progress)
                    record = await self._attempt(identifier, body, payment, client, grader, threads, streak)
                    if record is None:
                        return
                    if record["outcome"] == "failed":
                        refused = record["permanent"]
                        if not self.stopped and not (refused and record["reason"] == known):
                            streak.failed(number, f"{record['reason']}: {record['detail']}", refused)
                        break
                bar.update()
                shown = {
                    "verified": self.num_verified,
                    "usd": f"{budget.spent_usd:.2f}",
                    **token_rate(bar, client.tokens),
                }
                shown |= client.faults
                bar.set_postfix(shown, refresh=False)

            async def rectify_within_target(identifier: str) -> None:
                if self.stopped or not await places.take():
                    self.stopped = self.stopped or "target_reached"
                    return
                try:
                    await rectify(identifier)
                finally:
                    places.give_back()

            try:
                await run_pool(
                    iter(pending),
                    rectify_within_target,
                    concurrency,
                    self.journal.sync,
                    stop_retrying=client.stop_retrying,
                    drain_seconds=drain_seconds,
                )
                streak.finish()
            except Interrupted:
                self.stopped = "interrupted"
                raise
            except RunFailed:
                self.stopped = "requests_failed"
                raise

    async def _attempt(
        self,
        identifier: str,
        body: dict[str, Any],
        payment: Payment,
        client: ChatClient | BatchClient,
        grader: Grader,
        threads: ThreadPoolExecutor,
        streak: FailureStreak,
    ) -> Row | None:
        """Ask the oracle once, judge its edit, and put both on file; returns the record, None if nothing was sent."""
        record = self.attempt_record(identifier, self.oracle.model)
        try:
            completion = await client.complete(body, payment)
            streak.succeeded()  # before its grading, which may wait for a worker
            payment.settle(self._cost(completion))
            record |= await self._judge(self.errors[identifier], completion, grader, threads)
        except CallFailed as failure:
            if failure.reason == "interrupted" and not payment.spent_usd:
                payment.settle(0.0)
                return None
            self.stopped = "budget_spent" if failure.reason == "budget_spent" else self.stopped
            record |= {"outcome": "failed", "reason": f"failed_{failure.reason}", "detail": failure.detail}
            record |= {"permanent": failure.permanent, "calls": failure.calls.num_calls}
        except (asyncio.CancelledError, UserError, RunFailed):
            payment.settle(0.0)
            if payment.spent_usd:  # on file, or the next run's budget would not know of it
                record |= {"outcome": "failed", "reason": "failed_interrupted", "detail": "", "permanent": False}
                self.record({**record, "cost_usd": payment.spent_usd})
            raise
        payment.settle(0.0)
        record["cost_usd"] = payment.spent_usd
        self.record(record)
        return record

    def _cost(self, completion: Completion) -> float | None:
        """Dollars for the answer; None where the server reports no token counts."""
        if completion.prompt_tokens is None or completion.completion_tokens is None:
            return None
        return self.prices.cost(completion.prompt_tokens, completion.completion_tokens)

    async def _judge(self, error: Row, completion: Completion, grader: Grader, threads: ThreadPoolExecutor) -> Row:
        """The attempt's record: verified, or rejected with a reason and a detail for the next attempt's hint."""
        record: Row = {
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "calls": completion.calls.num_calls,
            "endpoint": completion.endpoint,
            "seconds": round(completion.seconds, 3),
        }
        edit = parse_edit(completion.text, completion.finish_reason)
        if edit.text is None:
            return {**record, **rejected(edit.reason), "reply": completion.text}
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(threads, judge_edit, error, edit.text, grader, self.meter)
        return {**record, **verdict}
