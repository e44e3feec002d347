"""The planted faults of `make test-mutants` fit the sources: each text occurs once, and what replaces it is Python."""

from __future__ import annotations

import ast

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.processes import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.path}-{mutant.old[:30].strip()}")
def test_a_fault_fits_its_file(mutant):
    source = (ROOT / mutant.path).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.path} holds {mutant.old!r} {source.count(mutant.old)} times"
    ast.parse(source.replace(mutant.old, mutant.new))
    for test in mutant.tests.partition("split ")[0].split():
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_there_are_enough():
    assert len({(mutant.path, mutant.old) for mutant in MUTANTS}) == len(MUTANTS) >= 40
