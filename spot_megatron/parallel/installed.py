"""Whether an optional package can be used here, found out by importing it."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache


@lru_cache
def import_problem(module: str) -> str | None:
    """Why `module` cannot be imported, as the end of a sentence that starts with its name; None if it can.

    A compiled package that was built for another PyTorch is found by `find_spec` and fails on import only.
    """
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return "is not installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        return f"is installed, but its import fails ({type(error).__name__}: {first_line})"
    return None
