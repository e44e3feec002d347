"""A short form of `make test-faults`: training and elicitation killed, a few files damaged. About 40 s."""

from __future__ import annotations

from tests import processes
from tests.faults.table import Table


def test_a_few_faults(tmp_path):
    log = tmp_path / "log.txt"
    options = ["--kills", "5", "--damages", "0", "--parts", "train_async", "elicit"]
    options += ["--folder", str(tmp_path / "faults")]
    code = processes.run(["-m", "tests.faults", *options], log, timeout=280)
    output = processes.output_of(log)
    assert code == 0, output
    assert "| all |  | 4 | 0 | 4 | 0 | 0 | 0 | 0 |" in output, output


def test_bad_verdicts_are_listed():
    table = Table()
    table.add("train", "kill -9", "recovered", number=3)
    table.add("cache", "bit flip", "silent", "bit 3 of byte 7")
    assert table.details == ["silent: cache, bit flip: bit 3 of byte 7"]
    assert "| train | kill -9 | 3 | 0 | 3 |" in table.markdown()
