"""What became of every injected fault."""

from __future__ import annotations

from collections import Counter

VERDICTS = {
    "detected": "refused, with the file's name and no traceback",
    "recovered": "the same command ended with the results of an undisturbed run",
    "harmless": "nothing was reported and the results are the same",
    "unnamed": "refused without the file's name, or with a traceback",
    "lost": "the work could not be finished by the same command",
    "silent": "the results differ and nothing was reported",
}
BAD = ("unnamed", "lost", "silent")


class Table:
    """Verdicts by (what was disturbed, fault)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Counter[str]] = {}
        self.details: list[str] = []

    def add(self, kind: str, fault: str, verdict: str, detail: str = "", number: int = 1) -> None:
        assert verdict in VERDICTS, verdict
        self.rows.setdefault((kind, fault), Counter())[verdict] += number
        if verdict in BAD:
            self.details.append(f"{verdict}: {kind}, {fault}: {detail}")

    def count(self, kind: str) -> int:
        return sum(counter.total() for (name, _), counter in self.rows.items() if name == kind)

    def markdown(self) -> str:
        header = ["what", "fault", "injected", *VERDICTS]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for (kind, fault), counter in self.rows.items():
            cells = [kind, fault, counter.total(), *(counter[verdict] for verdict in VERDICTS)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        total: Counter[str] = sum(self.rows.values(), Counter())
        cells = ["all", "", total.total(), *(total[verdict] for verdict in VERDICTS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines) + "\n"
