"""A child process of the grader: reads (known, given) answers, writes whether they are equal, different or unknown.

One JSON array a line in, one JSON object a line out. Before each pair it sets timers whose signal the kernel delivers
as a kill, so that an endless computation ends at the limit even inside C code and even when the parent is gone.
"""

import json
import logging
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30  # bytes of address space
CLOCK_LIMIT = 60  # times the limit of CPU seconds: a process on a busy machine may wait that long for its turn


def main() -> None:
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a parent that was stopped reads no more: end without a traceback
    sys.setrecursionlimit(10_000)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    from tools.pairs.math_algebra import compare_expressions
    from tools.pairs.math_compare import compare

    for gold, given in ((r"\frac{x}{2}", "2"), (r"x^2+y", "y+x^2"), (r"2x+1=y", r"y=2x+2")):
        compare_expressions(gold, given)  # builds the parser's tables, which takes a second
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        gold, given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU seconds, so that a busy machine changes no verdict ...
        signal.setitimer(signal.ITIMER_REAL, CLOCK_LIMIT * seconds)  # ... and a bound on the clock
        try:
            answer = {"outcome": compare(gold, given, compare_expressions)}
        except (Exception, RecursionError) as error:  # whatever a parser of arbitrary text may raise
            answer = {"outcome": "unknown", "error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
