"""The benchmark programs' own arithmetic and sampling. About 25 s, most of it two trainings."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import against_trl, balance, growth
from benchmarks.cases import Case, make_pairs, write_pairs
from benchmarks.measure import anonymous_bytes, run_worker
from benchmarks.tables import markdown
from tests.support import SHAPE, save_random_hf


@pytest.mark.parametrize("shared", [0.0, 0.3, 0.7])
def test_pairs_share_what_they_say(shared):
    case = Case(response=50, shared=shared, num_pairs=3)
    pairs = make_pairs(case)
    assert pairs == make_pairs(case)
    for pair in pairs:
        chosen, rejected = pair["chosen_ids"], pair["rejected_ids"]
        assert len(chosen) == len(rejected) == 50
        assert next(i for i in range(50) if chosen[i] != rejected[i]) == round(50 * shared)


def test_anonymous_memory_of_this_process():
    with open("/proc/self/status") as file:
        before = anonymous_bytes(file.read())
    block = np.ones(2**24)  # 128 MiB
    with open("/proc/self/status") as file:
        assert 120 * 2**20 < anonymous_bytes(file.read()) - before < 140 * 2**20
    del block
    assert anonymous_bytes("Name:\tpython\n") == 0


def test_worker_is_watched_from_outside(tmp_path, monkeypatch):
    """The peak of a phase is the memory held in it, not that of another phase."""
    (tmp_path / "allocating.py").write_text(
        "import time\n"
        "import numpy as np\n"
        "from benchmarks.worker import Stopwatch, read_job, write_result\n"
        "job, watch = read_job(), Stopwatch()\n"
        "for name, size in (('large', 2**25), ('small', 2**21)):\n"
        "    watch.start(name); block = np.ones(size); time.sleep(0.2); watch.stop(); del block\n"
        "write_result(job, watch, [1.0])\n"
    )
    monkeypatch.setattr("benchmarks.measure.ROOT", against_trl.ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = tmp_path / "run.py"
    code.write_text(
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.argv = sys.argv[-2:]\n"
        "import runpy; runpy.run_module('allocating', run_name='__main__')\n"
    )
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {code} "$@"\n')
    wrapper.chmod(0o755)
    result = run_worker(wrapper, "allocating", {}, tmp_path / "job", timeout=60)
    large, small = result["phases"]
    assert large["peak_bytes"] - small["peak_bytes"] == pytest.approx((2**25 - 2**21) * 8, rel=0.2)
    assert result["peak_bytes"] >= large["peak_bytes"]
    assert large["cpu_seconds"] > 0 and large["wall_seconds"] >= 0.2


def test_our_worker_trains(tmp_path):
    """Layouts and objective of a real job on a small model: the losses start at 2 ln 2 and agree."""
    save_random_hf(tmp_path / "model", tied=True)
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(Case(20, 0.5, 4), vocab_size=SHAPE.vocab_size))
    job = {"model": str(tmp_path / "model"), "pairs": str(tmp_path / "pairs.jsonl"), "num_steps": 2, "batch_pairs": 2}
    job |= {"pairs_per_microbatch": 1, "objective": "spot_bco"}
    results = []
    for layout in against_trl.LAYOUTS:
        own = {"layout": layout, "output": str(tmp_path / layout / "run")}
        results.append(run_worker(sys.executable, "benchmarks.our_worker", job | own, tmp_path / layout, timeout=200))
    assert [phase["name"] for phase in results[0]["phases"]] == ["reference", "step", "step"]
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], abs=against_trl.LAYOUT_TOLERANCE)
    assert results[0]["losses"][0] == pytest.approx(2 * np.log(2), abs=1e-6)
    assert results[0]["tokens"][0][0] == results[1]["tokens"][0][1] > results[0]["tokens"][0][1]


def test_a_failed_worker_is_told_with_its_output(tmp_path):
    with pytest.raises(RuntimeError, match="No module named"):
        run_worker(sys.executable, "benchmarks.no_such_worker", {}, tmp_path, timeout=60)


def result(seconds, loss):
    phase = {"name": "step", "wall_seconds": seconds, "peak_bytes": 2**30}
    steps = [{**phase, "cpu_seconds": 100.0}, {**phase, "cpu_seconds": seconds}]
    reference = {"name": "reference", "cpu_seconds": seconds / 2, "wall_seconds": 1.0, "peak_bytes": 2**29}
    return {
        "phases": [reference, *steps],
        "peak_bytes": 2**31,
        "losses": [1.0, loss],
        "versions": {},
        "num_parameters": 1,
        "tokens": [[10, 6]],
    }


def test_summary_leaves_the_first_step_out_and_the_table_has_its_ratios():
    ours, theirs = ([result(s, 0.5) for s in seconds] for seconds in ((1.0, 2.0, 3.0), (4.0, 4.0, 4.0)))
    systems = {"shared": against_trl.summary(ours), "TRL 0.20.0": against_trl.summary(theirs)}
    assert systems["shared"]["step_cpu_seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "count": 3}
    assert systems["shared"]["reference_cpu_seconds"]["median"] == 1.0
    case = {
        "response": 600,
        "shared": 0.7,
        "steps": 2,
        "loss_differences": dict.fromkeys(systems, 0.0),
        "systems": systems,
    }
    settings = {"batch_pairs": 2, "pairs_per_microbatch": 1}
    text = markdown({"trl": "0.20.0", "settings": settings, "machine": "a machine", "cases": [case]})
    row = next(line for line in text.splitlines() if "| shared | 2.0" in line)
    assert "| 2.0 (1.0 to 3.0) | 0.50 |" in row
    assert "| 2.5 | 0.50 |" in row  # half of the reference pass besides
    json.dumps(systems)


def test_losses_that_disagree_are_an_error():
    systems = {"shared": {"losses": [1.0, 2.0]}, "separate": {"losses": [1.0, 2.0 + 5e-5]}, "TRL": {"losses": [1, 2]}}
    case = Case(600, 0.7, 2)
    with pytest.raises(AssertionError, match="layouts"):
        against_trl.check_losses(case, systems)
    systems["separate"]["losses"][1] = 2.0
    assert against_trl.check_losses(case, systems) == {"shared": 0, "separate": 0, "TRL": 0}
    systems["TRL"]["losses"] = [1.0, 2.001]
    with pytest.raises(AssertionError, match="TRL"):
        against_trl.check_losses(case, systems)


def test_growth_fits_a_line_and_tells_what_is_off_it():
    points = [{"rows": n, "cost": n, "peak_bytes": 100 + 2 * n, "cpu_seconds": 1 + 3 * n} for n in (10, 20, 40)]
    report = growth.with_fits([dict(point) for point in points])
    assert report["memory"] == pytest.approx({"base_bytes": 100, "bytes_per_row": 2})
    assert report["time"] == pytest.approx({"constant_seconds": 1, "seconds_per_cost": 3})
    points[1]["cpu_seconds"] *= 2
    assert max(abs(p["time_error"]) for p in growth.with_fits(points)["points"]) > 0.1


def test_balance_of_known_costs():
    """Four equal pairs on two ranks are even; one pair of half the work bounds every dealing."""
    rows = np.array([100, 100, 100, 100])
    assert balance.simulate(rows, rows.astype(float), 2, 4, 1)["slowest_over_mean"] == 1.0
    found = balance.simulate(np.array([300, 100, 100, 100]), np.array([300.0, 100, 100, 100]), 4, 4, 64)
    assert found["slowest_over_mean"] == found["bound"] == 2.0
    assert found["padding"] == pytest.approx((20 + 3 * 28) / (320 + 3 * 128))


def test_lengths_of_the_simulation():
    pairs = balance.lognormal_pairs(2000, seed=1)
    lengths = np.array([len(pair.chosen_ids) for pair in pairs])
    assert lengths.mean() == pytest.approx(2000, rel=0.06)
    assert lengths.std() / lengths.mean() == pytest.approx(0.6, abs=0.1)
    assert max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs) <= balance.MOST_TOKENS
