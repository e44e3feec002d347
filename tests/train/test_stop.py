"""Signals as a request to save and go."""

from __future__ import annotations

import signal

import pytest

from spot_megatron.train.stop import SAME_REQUEST_SECONDS, StopSignal
from tests.processes import output_of, run


@pytest.fixture
def heard(monkeypatch):
    """Signals that reached the handler outside of StopSignal."""
    numbers: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: numbers.append(n)) for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_request_told_twice_is_one(heard):
    with StopSignal() as stop:
        assert stop._received_at is None
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert stop._received_at is not None and not heard
        stop._received_at -= SAME_REQUEST_SECONDS
        signal.raise_signal(signal.SIGUSR1)
        assert not heard
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM, signal.SIGTERM]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_before_the_updates_ends_at_once(tmp_path, number):
    code = "import os, signal; from spot_megatron.train import __main__ as program\n"
    code += f"program._train = lambda *_: os.kill(os.getpid(), signal.{number})\nprogram.main(['any'])"
    assert run(["-c", code], tmp_path / "log") == 75
    assert output_of(tmp_path / "log").startswith("stopped at once by a signal; run the same command")
