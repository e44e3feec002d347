"""Running many requests at once: a bounded number of workers, a progress bar, and an orderly stop."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_SYNC_SECONDS = 5.0
DRAIN_SECONDS = 20.0  # below the grace of batch systems (Slurm and Kubernetes: 30 s)


class Interrupted(Exception):
    """SIGINT or SIGTERM came: everything finished is on file, and the same command continues."""


class RunFailed(Exception):
    """The run cannot continue although the user's input is right; the same command continues it later."""


async def run_pool(
    items: Iterator[Item],
    handle: Callable[[Item], Awaitable[None]],
    concurrency: int,
    every_few_seconds: Callable[[], None],
    *,
    stop_retrying: Callable[[], None] = lambda: None,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Apply `handle` to every item, `concurrency` at a time, taking items from the iterator only as workers get free.

    `every_few_seconds` runs in a thread of its own (to flush the journal). After the first exception of a handler, or a
    signal, no further item is taken, `stop_retrying` is called, and the handlers under way end by themselves: after a
    signal within `drain_seconds`, else cancelled; a second signal cancels them at once. Then the exception, or
    Interrupted, is raised.
    """
    stop, failures = asyncio.Event(), list[BaseException]()
    halted = asyncio.Event()

    async def work() -> None:
        for item in items:
            try:
                await handle(item)
            except Exception as error:
                failures.append(error)
                halted.set()
            if halted.is_set():
                return

    async def tick() -> None:
        while True:
            await asyncio.sleep(_SYNC_SECONDS)
            await asyncio.to_thread(every_few_seconds)

    with _stop_signals(stop):
        workers = asyncio.gather(*(work() for _ in range(concurrency)))
        flushing = asyncio.ensure_future(tick())
        events = [asyncio.ensure_future(event.wait()) for event in (stop, halted)]
        tasks: list[asyncio.Future[Any]] = [workers, flushing, *events]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if flushing in done:
                flushing.result()  # raises what a failing flush (a full disk) raised
            was_signal = stop.is_set()
            if workers not in done:
                halted.set()
                stop_retrying()
                await _drain(workers, stop, drain_seconds if was_signal else None)
            if was_signal:
                raise Interrupted
            if failures:
                raise failures[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(workers: "asyncio.Future[Any]", stop: asyncio.Event, seconds: float | None) -> None:
    """Wait for the workers: until they end, `seconds` have passed, or the next signal comes."""
    stop.clear()
    print("stopping: waiting for the requests under way; a signal cancels them", file=sys.stderr)
    signalled = asyncio.ensure_future(stop.wait())
    await asyncio.wait([workers, signalled], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()


@contextlib.contextmanager
def _stop_signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    handled = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            loop.add_signal_handler(number, stop.set)
            handled[number] = before
    except (ValueError, RuntimeError):
        pass  # not the main thread: whoever owns the signals stops us by cancelling
    try:
        yield
    finally:
        for number, before in handled.items():
            loop.remove_signal_handler(number)
            signal.signal(number, before or signal.SIG_DFL)


class FailureStreak:
    """Stops a run that cannot succeed: `limit` requests in a row failed for good (the server is gone), or each of the
    first `limit` was refused (it is not the questions that are bad).

    Refusals are quick and answers slow, so that refusals count by the order in which requests were begun.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._length = self._num_begun = self._num_failed = self._num_first_refused = 0
        self._served = False
        self._end = ""  # the end of RunFailed's message, after the latest failure

    def begin(self) -> int:
        """The number of the next request of this run, from 0."""
        self._num_begun += 1
        return self._num_begun - 1

    def succeeded(self) -> None:
        self._served = True
        self._length = 0

    def failed(self, number: int, why: str, refused: bool) -> None:
        """Count request `number`; `refused`: sending it again would bring the same. Raises RunFailed."""
        self._num_failed += 1
        self._end = f"failed, the last one by {why}. {_REFUSED if refused else _GONE}"
        if refused:
            self._num_first_refused += number < self._limit
            if self._num_first_refused == self._limit and number < self._limit:
                raise RunFailed(f"the first {self._limit} requests {self._end}")
            return
        self._length += 1
        if self._length >= self._limit:
            raise RunFailed(f"{self._length} requests in a row {self._end}")

    def finish(self) -> None:
        """Raises RunFailed when requests failed and not one was answered."""
        if self._num_failed and not self._served:
            raise RunFailed(f"all requests of this run ({self._num_failed}) {self._end}")


_GONE = "Nothing that was finished is lost: repair the server and run the same command again."
_REFUSED = (
    "The server refuses such requests: change what it names (--model, --max-tokens, --thinking server, --extra-body) "
    "and run again with the same --output; what was refused is asked again."
)


def progress_bar(stage: str, total: int, done: int, unit: str) -> "tqdm[None]":
    """A bar with rate and ETA on stderr; into a file it writes a line every half minute instead of a moving bar."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=total, initial=done, desc=stage, unit=unit, mininterval=30.0 if quiet else 0.5, dynamic_ncols=True
    )


def token_rate(bar: "tqdm[None]", num_tokens: int) -> dict[str, str]:
    """Tokens per second since the bar began, for its postfix."""
    return {"tokens/s": f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f}"}
