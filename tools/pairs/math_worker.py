"""A child process of the grader: reads (gold, given) pairs, answers whether they are equal as mathematics.

One JSON array a line in, one JSON object a line out. Before each pair it sets timers whose signal the kernel delivers
as a kill, so that an endless computation ends at the limit even inside C code and even when the parent is gone.
"""

import json
import logging
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30  # bytes of address space


def main() -> None:
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a parent that was stopped reads no more: end without a traceback
    sys.setrecursionlimit(10_000)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def equal(gold: str, given: str) -> bool:
        sides = [parse(rf"\boxed{{{side}}}", extraction_config=configs, parsing_timeout=None) for side in (gold, given)]
        return bool(
            sides[0] and sides[1] and verify(*sides, timeout_seconds=None)
        )  # verify is not symmetric: gold first

    for gold, given in (("1", "2"), (r"\{1,2\}", r"\{2,1\}"), (r"\frac{1}{2}", "(1,2]")):
        equal(gold, given)  # builds the parser's tables, which takes a second
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        gold, given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU seconds, so that a busy machine changes no verdict ...
        signal.setitimer(signal.ITIMER_REAL, 4 * seconds)  # ... and a bound on the clock
        try:
            answer: dict[str, object] = {"equal": equal(gold, given)}
        except (Exception, RecursionError) as error:  # whatever a parser of arbitrary text may raise
            answer = {"equal": False, "error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
