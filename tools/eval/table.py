"""An evaluation as text."""

from typing import Any

from tools.eval.benchmarks import PAPER_ROWS
from tools.eval.statistics import GROUPS


def table(found: dict[str, Any]) -> str:
    """Every skill's accuracy in per cent with counts, the paired difference with its 95 % interval, the averages of the
    paper's table, and what the reader should know of."""
    base, model = found["base"], found["model"]
    differences = found.get("skill_differences", {})
    width = max(12, *(len(name) for name in model["skills"])) if model["skills"] else 12
    header = f"{'skill':<{width}}" + (f"{'base':>20}" if base else "") + f"{'model':>20}"
    header += "  difference, 95 % interval" if base else ""
    lines = [header, "-" * len(header)]
    for name, score in model["skills"].items():
        before = base["skills"].get(name) if base else None
        line = f"{name:<{width}}" + (_cell(before) if base else "") + _cell(score)
        lines.append(line + (_difference(differences.get(name)) if base else ""))
    lines += _averages(found) + _instructions(found)
    for name, result in (("base", base), ("model", model)):
        lines += _remarks(name, result) if result else []
    return "\n".join(lines)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return f"{'-':>20}"
    counts = f"({score['correct']}/{score['total']})"
    return f"{100 * score['accuracy']:>8.1f} {counts:>11}"


def _difference(change: dict[str, Any] | None) -> str:
    if change is None:
        return ""
    text = f"{100 * change['difference']:>+12.1f}"
    if change["interval"]:
        low, high = (100 * bound for bound in change["interval"])
        text += f"  [{low:+.1f}, {high:+.1f}]"
    return text


def _averages(found: dict[str, Any]) -> list[str]:
    """The paper's four columns, its own rows below those of this evaluation."""
    sides = [(found[name]["model"], found[name]["averages"]) for name in ("base", "model") if found[name]]
    if not any(averages for _, averages in sides):
        return []
    columns = (*GROUPS, "overall")
    width = max(len(name) for name, _ in (*sides, ("SPoT (paper, Qwen3-8B)", None)))
    lines = ["", f"{'averages':<{width}}" + "".join(f"{name:>18}" for name in columns)]
    for name, averages in sides:
        cells = []
        for column in columns:
            row = averages.get(column)
            part = f" ({row['benchmarks']} of {row['of']})" if row and row["benchmarks"] < row["of"] else ""
            cells.append(f"{100 * row['accuracy']:.1f}{part}" if row else "-")
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
    for name in ("Qwen3-8B", "SPoT"):
        shown = f"{name} (paper)" if name == "Qwen3-8B" else f"{name} (paper, Qwen3-8B)"
        lines.append(f"{shown:<{width}}" + "".join(f"{value:>18.1f}" for value in PAPER_ROWS[name]))
    return lines


def _instructions(found: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("base", "model"):
        row = found[name]["benchmarks"].get("ifeval") if found[name] else None
        if row and row["accuracy"] is not None:
            parts = (
                f"{level} {kind} {100 * row[f'{level}_{kind}']:.1f}"
                for level in ("prompt", "instruction")
                for kind in ("strict", "loose")
            )
            lines.append(f"{name}: IFEval {', '.join(parts)}")
    return lines


def _remarks(name: str, result: dict[str, Any]) -> list[str]:
    totals = {key: sum(score[key] for score in result["skills"].values()) for key in ("cut", "undecided")}
    lines = []
    if totals["cut"]:
        lines.append(f"{name}: {totals['cut']} responses reached the token limit and were graded as they stood")
    if totals["undecided"]:
        lines.append(f"{name}: {totals['undecided']} responses are undecided: neither confirmed nor disproved")
    for title, row in ((row["title"], row) for row in result["benchmarks"].values()):
        for k in sorted(row.get("pass_at", {}), key=int)[-1:]:
            voted = row.get("majority_at", {}).get(k)
            vote = "" if voted is None else f", majority@{k} {100 * voted:.1f}"
            lines.append(f"{name}: {title} pass@{k} {100 * row['pass_at'][k]:.1f}{vote}")
        if row["missing"]:
            reasons = ", ".join(f"{reason} {count}" for reason, count in row["missing"].items())
            lines.append(f"{name}: {title}: samples without an answer, left out of the score: {reasons}")
    return lines
