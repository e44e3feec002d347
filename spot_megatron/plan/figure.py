"""The plan as one self-contained page: bars of memory and time, changes that fit or are faster, and warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spot_megatron.errors import RecipeError
from spot_megatron.plan.estimate import Estimate
from spot_megatron.plan.hardware import GIB
from spot_megatron.plan.search import Option
from spot_megatron.plan.text import MEMORY_NAMES, duration, parameters, split_words, step_groups
from spot_megatron.report.charts import Chart, stacked_bar
from spot_megatron.report.html import render_page


def write_figure(path: Path, estimate: Estimate, fits: Sequence[Option], best: Sequence[Option]) -> None:
    """Writes the page.

    Raises:
        RecipeError: the file cannot be written.
    """
    memory, times = _memory_bars(estimate, [*fits, *best]), _time_bars(estimate)
    page = render_page(
        Path(__file__).with_name("figure.html.j2"),
        [*memory, *times],
        estimate=estimate,
        parameters=parameters(estimate),
        split=split_words(estimate),
        total=duration(estimate.seconds),
        usable=estimate.inputs.gpu.usable_bytes / GIB,
        gib=GIB,
        memory=memory,
        times=times,
        options=_rows(fits or best),
        options_title="Cheapest changes that make it fit" if fits else "Fastest configurations that fit",
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--figure {path} cannot be written ({error}); choose another file") from None


def _memory_bars(estimate: Estimate, options: Sequence[Option]) -> list[Chart]:
    """The recipe's memory and, below it, the alternatives', on one scale with the usable memory as a mark."""
    shown = [("This recipe", estimate), *((option.flags, option.estimate) for option in options if option.flags)]
    shown = [shown[0], *(pair for pair in shown[1:] if pair[1].inputs.gpu is estimate.inputs.gpu)][:6]
    usable = estimate.inputs.gpu.usable_bytes
    scale = max(usable * 1.06, *(found.memory.total for _, found in shown))
    return [
        stacked_bar(
            title,
            [(MEMORY_NAMES[name], size, f"{size / GIB:.1f} GiB") for name, size in found.memory.parts().items()],
            scale=scale,
            mark=usable,
            note=f"{found.memory.total / GIB:.1f} GiB, {duration(found.seconds)}",
            columns=("part", "memory"),
        )
        for title, found in shown
    ]


def _time_bars(estimate: Estimate) -> list[Chart]:
    step = estimate.step
    run_parts = [(name, seconds, duration(seconds)) for name, seconds in estimate.parts.items() if seconds]
    step_parts = [(name, seconds, f"{1000 * seconds:.0f} ms") for name, seconds in step_groups(step).items()]
    columns = ("part", "time")
    total = duration(estimate.seconds)
    return [
        stacked_bar("The whole run", run_parts, scale=estimate.seconds, note=total, columns=columns),
        stacked_bar("One optimizer step", step_parts, scale=step.total, note=f"{step.total:.2f} s", columns=columns),
    ]


def _rows(options: Sequence[Option]) -> list[tuple[str, str, str, str, str]]:
    return [
        (
            option.flags or "the recipe as it is",
            str(option.num_gpus),
            f"{option.estimate.memory.total / GIB:.1f} GiB",
            f"{option.estimate.mfu:.0%}",
            duration(option.estimate.seconds),
        )
        for option in options
    ]
