"""The readers of untrusted bytes as functions of bytes, instrumented where atheris is installed.

Each returns, or raises UserError with a message of one line that names the file.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris

    instrument = atheris.instrument_imports
except ImportError:
    instrument = contextlib.nullcontext

with instrument(
    include=["spot_megatron.files", "spot_megatron.recipe", "spot_megatron.data", "spot_megatron.hf", "tools.pairs"]
):
    from spot_megatron.data.records import read_pairs
    from spot_megatron.errors import UserError
    from spot_megatron.hf.safetensors import read_header
    from spot_megatron.recipe import load_recipe
    from tools.pairs.boxes import final_boxes
    from tools.pairs.grade import clean_gold, compare_at_once, extract, unusable_gold
    from tools.pairs.math_text import clean

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz_input_"))


def on_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        path = FOLDER / name
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            if name not in str(error):
                raise AssertionError(f"the message does not name the file: {error}") from error

    return target


def answers(data: bytes) -> None:
    """Finding boxes gives contents or a reason; equal texts are never called different."""
    text = data.decode("utf-8", errors="replace")
    contents, reason = final_boxes(text)
    assert bool(contents) != bool(reason), (contents, reason)
    found, why = extract(text)
    assert bool(found) != bool(why), (found, why)
    unusable_gold(text)
    for content in [clean_gold(text), *contents]:
        given = clean(content)
        outcome = compare_at_once(given, given)
        assert outcome is None or outcome[0] == "correct" or not given or len(given) > 2000, (given, outcome)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "recipe": on_file("recipe.yaml", load_recipe),
    "records": on_file("pairs.jsonl", lambda path: read_pairs([path])),
    "answers": answers,
    "safetensors": on_file("model.safetensors", read_header),
}
