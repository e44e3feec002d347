"""These tests run under tests/nullcuda/make.sh's Python alone."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "tests/nullcuda" in str(item.path):
            item.add_marker(pytest.mark.nullcuda)
            if "SPOT_MEGATRON_NULL_CUDA" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="run with `make test-nullcuda`"))
