"""Optional packages: absent, broken, usable; and what is said of a broken one."""

from __future__ import annotations

import pytest
import torch

from spot_megatron.errors import RecipeError
from spot_megatron.model.attention.cuda import pick_kernel
from spot_megatron.model.config import has_transformer_engine
from spot_megatron.parallel.installed import import_problem


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """flash-attn and Transformer Engine as they are after PyTorch was updated without them."""
    for name in ("flash_attn", "transformer_engine"):
        (tmp_path / name).mkdir()
        error = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error")\n'
        (tmp_path / name / "__init__.py").write_text(error)
    monkeypatch.syspath_prepend(tmp_path)
    import_problem.cache_clear()
    yield
    import_problem.cache_clear()


def test_what_is_there_and_what_is_not():
    assert import_problem("json.decoder") is None
    assert import_problem("no_such_package.part") == "is not installed"


def test_a_broken_package_is_named_with_its_error(broken):
    with pytest.raises(RecipeError, match=r"flash-attn is installed, but its import fails .*undefined symbol"):
        pick_kernel("flash2", torch.bfloat16)
    with pytest.raises(RecipeError, match=r"Transformer Engine is installed, but its import fails .*undefined symbol"):
        has_transformer_engine()
    with pytest.warns(UserWarning, match=r"attention kernel flash2: .*undefined symbol.*another one is used"):
        assert pick_kernel("auto", torch.bfloat16) == "torch"
