"""Speed, memory and exactness of the data half: `python -m benchmarks.data_half [--only throughput lcs grading]`.

Prints Markdown and, with --output, writes it. Other programs disturb the throughput; if they cannot be stopped,
start this one with `chrt -r 1` (real-time priority).
"""

import argparse
import difflib
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import psutil

from spot_megatron.files import write_rows
from tools.pairs.grade import Grader

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
IN_FLIGHT, LATENCY_MS, NUM_RECORDS = 256, 50, 20_000


def throughput(repeats: int) -> list[str]:
    """Requests a second of two shards together against one server that answers after 50 ms."""
    ideal = IN_FLIGHT / (LATENCY_MS / 1000)
    lines = [
        f"## Throughput: {IN_FLIGHT} requests in flight, {LATENCY_MS} ms each, {NUM_RECORDS:,} records",
        "",
        f"Ideal: {ideal:,.0f} requests/s. `python -m tools.elicit`, answers graded and journalled, in two processes of "
        f"{IN_FLIGHT // 2} in flight (`--shard 0/2`, `1/2`), and the server: three processes, {os.cpu_count()} cores.",
        "Rate: between 5 % and 90 % of the records. CPU: start-up and output files included. Other load: cores that "
        "processes outside this measurement kept busy meanwhile. RSS: of one shard.",
        "",
        "| run | requests/s | of ideal | CPU us/request: clients, server | other load | MB at 10 / 50 / 99 % |",
        "|---|---|---|---|---|---|",
    ]
    for number in range(repeats):
        rate, client_cpu, server_cpu, load, memory = _one_throughput_run(answer="Adding gives 7.")
        shown = " / ".join(f"{value / 2**20:.1f}" for value in memory)
        lines.append(
            f"| {number + 1} | {rate:,.0f} | {rate / ideal:.0%} | {client_cpu:.0f}, {server_cpu:.0f} "
            f"| {load:.2f} | {shown} |"
        )
    *_, memory = _one_throughput_run(answer="A long answer. " * 700)
    shown = " / ".join(f"{value / 2**20:.1f}" for value in memory)
    lines += ["", f"The same with answers of 10.5 kB (a journal of 210 MB): RSS {shown} MB.", ""]
    return lines


def _one_throughput_run(answer: str) -> tuple[float, float, float, float, list[int]]:
    """(requests/s, client and server CPU us a request, cores that others used, RSS of shard 0 at three points)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = ({"id": f"q{n}", "question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(NUM_RECORDS))
        write_rows(folder / "questions.jsonl", questions)
        server = _start("oracle_server", "--port", "0", "--latency-ms", str(LATENCY_MS), "--fixed-answer", answer)
        assert server.stdout
        url = json.loads(server.stdout.readline())["serving"]
        options = ["--questions", str(folder / "questions.jsonl"), "--output", str(folder / "out")]
        options += ["--base-url", url, "--model", "m", "--concurrency", str(IN_FLIGHT // 2)]
        shards = [_start("elicit", *options, "--shard", f"{index}/2") for index in (0, 1)]
        watch = _Watch(shards, server)
        watch.follow([folder / f"out/responses.shard-{index}-of-2.jsonl" for index in (0, 1)])
        server.kill()
        server.wait()
        return watch.result()


def _start(name: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"tools.{name}", *options]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


class _Watch:
    """Follows the shards' journals and processes from outside."""

    def __init__(self, shards: list[subprocess.Popen[bytes]], server: subprocess.Popen[bytes]) -> None:
        self._shards = shards
        self._processes = [psutil.Process(process.pid) for process in (*shards, server)]
        self._server_start = sum(self._processes[-1].cpu_times()[:2])
        self._other_load = 0.0
        self._points: list[tuple[float, int, int]] = []  # time, records of both, RSS of shard 0
        self._cpu = [0.0, 0.0, 0.0]

    def follow(self, journals: list[Path]) -> None:
        machine, started, mine = psutil.cpu_times(), time.monotonic(), time.process_time()
        sizes = [0, 0]
        counts = [0, 0]
        while any(process.poll() is None for process in self._shards):
            for index, process in enumerate(self._processes):
                try:
                    self._cpu[index] = sum(process.cpu_times()[:2])
                except psutil.NoSuchProcess:
                    continue
            for index, journal in enumerate(journals):
                if journal.exists():
                    with journal.open("rb") as file:
                        file.seek(sizes[index])
                        new = file.read()
                    counts[index] += new.count(b"\n")
                    sizes[index] += len(new)
            if self._shards[0].poll() is None:
                self._points.append((time.monotonic(), sum(counts), self._processes[0].memory_info().rss))
            time.sleep(0.05)
        after, seconds = psutil.cpu_times(), time.monotonic() - started
        busy = sum(getattr(after, key) - getattr(machine, key) for key in ("user", "system", "nice", "irq", "softirq"))
        own = sum(self._cpu) - self._server_start + time.process_time() - mine
        self._other_load = max(0.0, (busy - own) / seconds)

    def result(self) -> tuple[float, float, float, float, list[int]]:
        asking = [point for point in self._points if 0.05 * NUM_RECORDS < point[1] < 0.9 * NUM_RECORDS]
        (start, first, _), (end, last, _) = asking[0], asking[-1]
        memory = [
            next(rss for _, count, rss in self._points if count >= share * NUM_RECORDS) for share in (0.1, 0.5, 0.99)
        ]
        client = sum(self._cpu[:2]) / NUM_RECORDS * 1e6
        server = (self._cpu[2] - self._server_start) / NUM_RECORDS * 1e6
        return (last - first) / (end - start), client, server, self._other_load, memory


def lcs(num_pairs: int = 4000) -> list[str]:
    """The change ratio's LCS against difflib, on token ids like those of mathematical prose."""
    from rapidfuzz.distance import LCSseq

    pairs = list(_token_pairs(num_pairs))
    exact = [_bit_parallel_lcs(chosen, rejected) for chosen, rejected in pairs]
    methods: dict[str, tuple[int, Callable[[list[int], list[int]], int]]] = {
        "rapidfuzz LCSseq (used)": (num_pairs, LCSseq.similarity),
        "difflib, default": (num_pairs, lambda a, b: _difflib_matches(a, b, autojunk=True)),
        "difflib, autojunk=False": (num_pairs // 10, lambda a, b: _difflib_matches(a, b, autojunk=False)),
    }
    lines = [
        f"## Longest common subsequence: {num_pairs:,} pairs of about 2,500 tokens",
        "",
        "CPU time of one process. Exactness is against an independent bit-parallel computation. 'Other decisions': "
        "pairs that come to lie on the other side of gamma = 0.6.",
        "",
        "| method | us a pair | against ours | exact on | mean / largest error of R | other decisions |",
        "|---|---|---|---|---|---|",
    ]
    ours = 0.0
    for name, (count, method) in methods.items():
        started = time.process_time()
        found = [method(chosen, rejected) for chosen, rejected in pairs[:count]]
        microseconds = (time.process_time() - started) / count * 1e6
        ours = ours or microseconds
        ratios = [
            (1 - true / len(chosen), 1 - value / len(chosen))
            for true, value, (chosen, _) in zip(exact, found, pairs, strict=False)
        ]
        errors = [value - true for true, value in ratios]
        flips = sum((true > 0.6) != (value > 0.6) for true, value in ratios)
        lines.append(
            f"| {name} | {microseconds:,.0f} | {microseconds / ours:.0f}x | {errors.count(0.0):,} of {count:,} "
            f"| {sum(errors) / count:.3f} / {max(errors):.3f} | {flips} |"
        )
    return [*lines, ""]


def _token_pairs(num_pairs: int) -> Iterator[tuple[list[int], list[int]]]:
    """(chosen, rejected) ids: a shared prefix (a third on average), then rewritten stretches over 2-70 % of the rest.

    Frequencies and ids are set to those of Qwen3's tokenizer on mathematical prose (documentation of sympy): in 2,500
    tokens some 440 different ones, the commonest with 7 %, a quarter of all ids below 256 and 60 % below 1,000.
    """
    rng = random.Random(0)
    for _ in range(num_pairs):
        words = list({int(math.exp(rng.gauss(6.4, 1.3))) for _ in range(700)})
        rng.shuffle(words)

        def tokens(count: int, words: list[int] = words) -> list[int]:
            top = len(words) - 1
            return [words[min(top, int(1.3 * (len(words) / 1.3 + 1) ** rng.random() - 1.3))] for _ in range(count)]

        rejected = tokens(int(2500 * rng.uniform(0.8, 1.2)))
        first_edit, share = int(rng.betavariate(1, 2) * len(rejected)), rng.uniform(0.02, 0.7)
        chosen = rejected[:first_edit]
        for start in range(first_edit, len(rejected), 40):
            kept = rng.random() > share
            chosen += rejected[start : start + 40] if kept else tokens(rng.randint(10, 70))
        yield chosen, rejected


def _bit_parallel_lcs(a: list[int], b: list[int]) -> int:
    """An independent exact length: one big integer per row of the table (Hyyro 2004)."""
    positions: dict[int, int] = {}
    for index, item in enumerate(a):
        positions[item] = positions.get(item, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full
    for item in b:
        matches = row & positions.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _difflib_matches(a: list[int], b: list[int], autojunk: bool) -> int:
    return sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk).get_matching_blocks())


def grading() -> list[str]:
    """The table of the tests: this grader beside the public reference's two rules."""
    from tests.tools.pairs.grading_cases import BOXED, WHOLE

    grader = Grader(time_limit=2.0)
    cases: list[tuple[str, str, str | None, str]] = [
        (f"So $\\boxed{{{given}}}$.", answer, None, verdict) for given, answer, verdict in BOXED
    ]
    cases += [(text, answer, finish, verdict) for text, answer, finish, verdict, _ in WHOLE]
    right = {"ours": 0, "elicited": 0, "rectified": 0}
    slowest, num_at_once = 0.0, 0
    for text, answer, finish, verdict in cases:
        num_at_once += grader.grade_at_once(text, answer, finish) is not None
        started = time.monotonic()
        right["ours"] += grader.grade(text, answer, finish).verdict == verdict
        slowest = max(slowest, time.monotonic() - started)
        # A hostile text is no answer, so the reference is right when it does not call it correct.
        right["elicited"] += _reference(text, answer, loose=True) == (verdict == "correct")
        right["rectified"] += _reference(text, answer, loose=False) == (verdict == "correct")
    grader.close()
    answers = [(rf"\boxed{{(x+{n})^2+{n % 97}}}", f"x^2+{2 * n}x+{n * n + n % 97}") for n in range(1, 201)]
    grader = Grader()
    grader.grade(*answers[0])
    started = time.monotonic()
    for case in answers[1:]:
        grader.grade(*case)
    algebra = 199 / (time.monotonic() - started)
    started = time.monotonic()
    for number in range(20_000):
        grader.grade(rf"so \boxed{{{number}}}", "17")
    numbers = 20_000 / (time.monotonic() - started)
    grader.close()
    return [
        f"## Grading: {len(cases)} cases of tests/tools/pairs/grading_cases.py",
        "",
        f"{num_at_once} are decided as text; the slowest took {slowest:.1f} s at a limit of 2 CPU seconds, the start "
        "of a killed worker's successor included.",
        "",
        "| rule | right |",
        "|---|---|",
        f"| this grader | {right['ours']} of {len(cases)} |",
        f"| public reference, elicited answers (regex, looser equality) | {right['elicited']} of {len(cases)} |",
        f"| public reference, rectified answers (regex, string equality) | {right['rectified']} of {len(cases)} |",
        "",
        f"One worker: {numbers:,.0f} numeric answers/s, {algebra:,.0f} answers/s that need algebra (none cached).",
        "",
    ]


def _reference(text: str, answer: str, loose: bool) -> bool:
    found = re.findall(r"\\boxed\{([^}]+)\}", text[-20_000:])  # quadratic in unclosed boxes: 700 kB would take hours
    if not found:
        return False
    if loose:
        return _loose(found[-1].strip()) == _loose(answer)
    return found[-1] == answer


def _loose(text: str) -> str:
    return text.strip().replace("\\", "").replace(" ", "").lower()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_half", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("throughput", "lcs", "grading"))
    parser.add_argument("--repeats", type=int, default=3, help="of the throughput run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    sections = {"throughput": lambda: throughput(args.repeats), "lcs": lcs, "grading": grading}
    lines = ["# The data half, measured", ""]
    lines += [
        f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}. Made by benchmarks/data_half.py"
        + (", at real-time priority on a machine in use." if os.sched_getscheduler(0) == os.SCHED_RR else "."),
        "",
    ]
    for name, section in sections.items():
        if args.only is None or name in args.only:
            lines += section()
            print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
