"""When one rank fails, its message comes first and all ranks end within seconds, even while they wait for it."""

from __future__ import annotations

import json
import time

import pytest

from spot_megatron.train.heartbeat import Heartbeat, failed_rank
from tests import processes

WAITING = """
import os, sys, time
from spot_megatron.train.heartbeat import Heartbeat
rank = int(os.environ["RANK"])
with Heartbeat({run!r}, rank, 2, 1, "now") as heartbeat:
    heartbeat.beat(1, "training")
    while not (heartbeat.folder / f"rank_{{1 - rank}}").exists():  # both have begun
        time.sleep(0.05)
    if rank == 1:
        {failure}
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "failure",
    ["raise ValueError('rank 1 is broken')", "os.kill(os.getpid(), 9)"],
    ids=["exception", "killed"],
)
def test_all_ranks_end(tmp_path, failure):
    """Both processes without torchrun, which would end them by itself; rank 0 never looks at signals."""
    code = WAITING.format(run=tmp_path, failure=failure).replace(
        repr(tmp_path), f"__import__('pathlib').Path({str(tmp_path)!r})"
    )
    logs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    started = [processes.start(["-c", code], log, environment={"RANK": str(rank)}) for rank, log in enumerate(logs)]
    try:
        begin = time.monotonic()
        assert started[0].wait(60) == 1, processes.output_of(logs[0])
        assert time.monotonic() - begin < 40
        assert started[1].wait(60) != 0
    finally:
        for process in started:
            processes.kill_all(process)
    assert "[rank 0] ended because rank 1 failed" in processes.output_of(logs[0])
    if failure.startswith("raise"):
        assert "rank 1 is broken" in processes.output_of(logs[1])


def test_a_finished_rank_has_not_failed(tmp_path):
    with Heartbeat(tmp_path, 0, 2, 1, "now") as heartbeat:
        heartbeat.beat(3, "training")
        assert failed_rank(heartbeat.folder, 2, "now") is None
    assert failed_rank(heartbeat.folder, 2, "now") is None
    beat = json.loads((heartbeat.folder / "rank_0").read_text())
    assert (beat["doing"], beat["step"]) == ("finished", 3)
    (heartbeat.folder / "rank_0").write_text(json.dumps(beat | {"doing": "training", "pid": 2**22 + 1}))
    assert failed_rank(heartbeat.folder, 2, "now") == 0
    assert failed_rank(heartbeat.folder, 2, "another start") is None
    del beat["start"]  # an earlier version's
    (heartbeat.folder / "rank_0").write_text(json.dumps(beat | {"doing": "training", "pid": 2**22 + 1}))
    assert failed_rank(heartbeat.folder, 2, "now") is None


def test_a_rank_may_begin_long_before_another(tmp_path):
    """Rank 1 has begun, and failed, before rank 0's process is there."""
    with Heartbeat(tmp_path, 1, 2, 1, "now") as heartbeat:
        heartbeat.beat(1, "training")
    file = heartbeat.folder / "rank_1"
    beat = json.loads(file.read_text())
    file.write_text(json.dumps(beat | {"doing": "training", "pid": 2**22 + 1, "time": beat["time"] - 60}))
    assert failed_rank(Heartbeat(tmp_path, 0, 2, 1, "now").folder, 2, "now") == 1
