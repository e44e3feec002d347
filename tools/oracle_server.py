"""`python -m tools.oracle_server --port P`: a local OpenAI-compatible server for tests and demos.

It rectifies the tiny model's answers by rule and answers its questions, by rule or with the model given by --policy.
"""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from spot_megatron.errors import RecipeError, UserError, WeightError, print_error
from tools.oracle.http_server import FAULTS, IDLE_CLOSE, REPLY_FAULTS, Answer, Answerer, Faults, Service, serve


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.oracle_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free port; the first output line names it")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="time before every answer")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of calls that fail, spread over --faults")
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=(*FAULTS, IDLE_CLOSE, *REPLY_FAULTS),
        default=list(FAULTS),
        metavar="KIND",
        help=f"default: {' '.join(FAULTS)}; also: {' '.join((IDLE_CLOSE, *REPLY_FAULTS))}",
    )
    parser.add_argument("--slow-seconds", type=float, default=5.0, help="pause in the middle of a slow body")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and of the rule-made answers")
    parser.add_argument(
        "--wrong-rate", type=float, default=0.4, help="share of wrong answers when no --policy is given"
    )
    parser.add_argument("--policy", type=Path, help="HF model folder that answers the questions (sampled on the CPU)")
    parser.add_argument("--fixed-answer", help="answer every request with this text (for measurements)")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError("must lie between 0 and 65535")
    return port


def _answerer(args: argparse.Namespace) -> Answerer:
    if args.fixed_answer is not None:
        fixed = Answer(args.fixed_answer, prompt_tokens=1, completion_tokens=1)
        return lambda request, fault: fixed
    from tools.oracle.rules import RuleOracle

    rules = RuleOracle(args.wrong_rate, args.seed)
    if args.policy is None:
        return rules
    if not (args.policy / "config.json").is_file():  # transformers would take the path for a hub id and ask there
        raise WeightError(f"--policy {args.policy}: no config.json there; give a Hugging Face model folder")
    from tools.oracle.model import ModelPolicy

    return ModelPolicy(args.policy, otherwise=rules)


async def run(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM. Raises UserError when the policy or the address cannot be used."""
    faults = Faults(args.fault_rate, args.seed, tuple(args.faults))
    model = str(args.policy or "oracle")
    service = Service(_answerer(args), faults, model, args.latency_ms / 1000, args.slow_seconds)
    try:
        server = await serve(service, args.host, args.port)
    except OSError as error:
        raise RecipeError(
            f"cannot listen on {args.host}, port {args.port} ({error.strerror or error}); end the program that does, "
            "or choose another --port (0 takes a free one)"
        ) from None
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"serving": f"http://{args.host}:{port}/v1", "model": model}), flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()


def main() -> int:
    try:
        asyncio.run(run(arguments().parse_args()))
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
