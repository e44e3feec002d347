"""User-facing errors and exit codes. Each message names the file, line or key and the remedy."""

from __future__ import annotations

import argparse
import sys

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; run the same command again


class UserError(Exception):
    """The user's input is wrong: programs print the message without a traceback and exit with code 2."""

    exit_code = EXIT_USER_ERROR


class RecipeError(UserError):
    """A recipe, an override or a combination of options is wrong. Names the file and the key."""


class PairError(UserError):
    """A JSONL file of questions, responses or pairs, or a line of it, is wrong. Names the file and the line."""


class WeightError(UserError):
    """A Hugging Face model folder is wrong, or does not fit the model. Names the tensor and the file."""


class CheckpointError(UserError):
    """A checkpoint or a run folder cannot be used. Names the folder and the remedy."""


class TrainingError(UserError):
    """A step gave numbers that must not be applied, saved or exported. Names step, ranks, parameter and pairs."""


def print_error(error: UserError, prefix: str = "") -> int:
    """Prints `error` to stderr in one paragraph and returns the program's exit code."""
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, a whole number; got {text!r}")
    return value
