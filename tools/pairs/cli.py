"""Shared by the programs of the data half: endpoint options, exit codes, key-value tables."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spot_megatron.errors import EXIT_FAILURE, EXIT_STOPPED, PairError, UserError, positive_int, print_error
from tools.pairs.batch import BatchClient
from tools.pairs.client import ChatClient
from tools.pairs.endpoint import API_KEY_VARIABLE, ApiKey
from tools.pairs.limits import Backoff, RateLimiter
from tools.pairs.pool import Interrupted, RunFailed

CONTINUES = "everything finished is on file. Run again to continue."
STARTS_OVER = "no file was written in part. Run the same command again; it starts from the beginning."


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to every option's help that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False, "", argparse.SUPPRESS) or action.default in ([], {}) or "default:" in text:
            return text
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {shown})".replace("%", "%%").strip()


def run_program(main: Callable[[], None], after_signal: str = CONTINUES) -> None:
    """Run and exit: 0 done, 1 failure, 2 the user's input is wrong, 75 stopped by SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        sys.exit(print_error(error))
    except RunFailed as error:
        sys.exit(_say(f"stopped: {error}", EXIT_FAILURE))
    except (Interrupted, KeyboardInterrupt):
        sys.exit(_say(f"stopped by a signal; {after_signal}", EXIT_STOPPED))


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def add_endpoint_options(parser: argparse.ArgumentParser, concurrency: int, takes_folder: bool = False) -> None:
    """Options of the endpoint: addresses, key, rates, retries. `takes_folder`: without an address --model is a folder,
    so the program always needs it."""
    group = parser.add_argument_group(
        "endpoint", f"The API key is read from {API_KEY_VARIABLE}; local servers need none."
    )
    group.add_argument(
        "--base-url", nargs="+", metavar="URL", help="one or more OpenAI-compatible servers of the same model"
    )
    name = "the name under which the servers serve it"
    model_help = f"{name}; without --base-url a model folder" if takes_folder else name
    group.add_argument("--model", required=takes_folder, help=model_help)
    group.add_argument(
        "--api-key-env", default=API_KEY_VARIABLE, metavar="NAME", help="environment variable that holds the key"
    )
    group.add_argument(
        "--key-over-http", action="store_true", help="send the key over plain http:// to other machines, too"
    )
    group.add_argument(
        "--wait-minutes",
        type=float,
        default=10.0,
        help="minutes for which requests wait while no server can be reached",
    )
    group.add_argument(
        "--concurrency", type=positive_int, default=concurrency, help="requests in flight, over all endpoints"
    )
    group.add_argument("--timeout", type=float, default=1800.0, help="seconds for one whole request")
    group.add_argument(
        "--max-calls",
        type=positive_int,
        default=10,
        help="HTTP calls for one request before it is given up; those that no server answers are not counted",
    )
    group.add_argument(
        "--batch",
        type=positive_int,
        nargs="?",
        const=5000,
        metavar="N",
        help="send batches of N requests through /v1/batches (at its prices) instead of single calls",
    )
    group.add_argument("--poll-seconds", type=float, default=30.0, help="between looks at a batch")
    group.add_argument("--requests-per-minute", type=float, help="rate limit of this process")
    group.add_argument(
        "--tokens-per-minute", type=float, help="rate limit of this process, prompt and completion together"
    )
    group.add_argument(
        "--max-failures",
        type=positive_int,
        default=20,
        help="stop when that many requests in a row are given up, or the first ones all refused",
    )
    group.add_argument(
        "--backoff-seconds", type=float, default=0.5, help="first wait between retries; doubles up to 60"
    )
    group.add_argument(
        "--extra-body",
        type=extra_body,
        default={},
        metavar="JSON",
        help="further keys of every request; null removes one",
    )


def make_client(args: argparse.Namespace) -> ChatClient | BatchClient:
    """The client that the endpoint options describe. Raises PairError for options that exclude each other."""
    if not args.base_url or not args.model:
        raise PairError(
            "--base-url and --model are needed: the server's address, such as http://127.0.0.1:8000/v1, and its model."
        )
    if args.batch:
        if len(args.base_url) > 1 or args.requests_per_minute or args.tokens_per_minute:
            raise PairError("--batch takes one --base-url and no rate limit; leave the others out")
        if args.extra_body.get("seed", 0) is None and getattr(args, "samples", 1) > 1:
            raise PairError('--batch needs a seed in every request of --samples; leave "seed" out of --extra-body')
        key = ApiKey(args.api_key_env, args.key_over_http)
        return BatchClient(
            args.base_url[0], key, args.output, args.batch, args.poll_seconds, patience=60.0 * args.wait_minutes
        )
    return ChatClient(
        args.base_url,
        timeout=args.timeout,
        max_calls=args.max_calls,
        patience=60.0 * args.wait_minutes,
        limiter=RateLimiter(args.requests_per_minute, args.tokens_per_minute),
        backoff=Backoff(base=args.backoff_seconds),
        key_variable=args.api_key_env,
        key_over_http=args.key_over_http,
    )


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def extra_body(text: str) -> dict[str, Any]:
    """Keys that would make a request that this program cannot read, or pay for answers that it does not read."""
    value = json_object(text)
    for key in ("messages", "stream", *(key for key in ("n", "best_of") if value.get(key) != 1)):
        if value.get(key):
            hint = "; --samples asks for more answers" if key == "n" else ""
            raise argparse.ArgumentTypeError(f"must not set {key!r}: one whole answer is read for a request{hint}")
    return value


def existing_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise PairError(f"{path}: no such file. Give the {what}.")
    return path


def output_folder(path: Path, names: Sequence[str], *needed: Path) -> None:
    """Make the folder of --output. Raises PairError when that cannot be, or when one of its `names` is needed."""
    _make_folder(path, f"--output {path}")
    for name in names:
        _check_not_needed(path / name, f"--output {path}", needed)


def output_file(path: Path, option: str, *needed: Path) -> None:
    """Make the folder that a file will lie in. Raises PairError when it cannot be written, or is one of `needed`."""
    _make_folder(path.parent, f"{option} {path}")
    if path.is_dir():
        raise PairError(f"{option} {path}: is a folder. Give the name of a file to write.")
    _check_not_needed(path, f"{option} {path}", needed)


def _make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PairError(f"{option}: the folder {path} cannot be made ({error.strerror}). Give another place.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PairError(f"{option}: nothing can be written into the folder {path}. Give another place.")


def _check_not_needed(path: Path, option: str, needed: Sequence[Path]) -> None:
    for source in needed:
        if path.resolve() == source.resolve():
            raise PairError(f"{option}: would overwrite {source}, which this run needs. Give another name or folder.")


def print_summary(summary: dict[str, Any]) -> None:
    """One aligned line per entry on stdout; nested counts as `reason n`, largest first."""
    shown = {key: value for key, value in summary.items() if key not in ("settings", "upstream")}
    width = max(map(len, shown))
    for key, value in shown.items():
        if isinstance(value, dict):
            parts = sorted(value.items(), key=lambda item: -item[1] if isinstance(item[1], (int, float)) else 0)
            value = ", ".join(f"{name} {number:,}" for name, number in parts) or "-"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{key.replace('_', ' '):<{width}}  {value}")
