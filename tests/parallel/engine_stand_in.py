"""Trains on a CPU as if Transformer Engine were installed: `engine_stand_in.py RECIPE`

Every module `transformer_engine...` imports, and every function of it raises when it is called, as the real one's do
without a CUDA device. What Megatron-Core takes from it is decided by that import.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types


class _Function(type):
    """Of classes that stand for anything: a base class, a name to compare with, a namespace; never a call."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Function(name, (), {"__module__": "transformer_engine"})

    def __call__(cls, *args, **kwargs):
        if cls.__name__ == "get_cpu_offload_context":  # asked for at each model, on any device
            return contextlib.nullcontext(), lambda hidden: hidden
        raise RuntimeError(f"Transformer Engine's {cls.__name__} needs a CUDA device")


class _Module(types.ModuleType):
    __version__ = "2.11.0"
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Function(name, (), {"__module__": self.__name__})


class Finder:
    """Finds every module of the package."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(name, Finder, is_package=True)

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        pass


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder)
    from megatron.core.optimizer import Adam, clip_grads

    taken = (Adam, clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl)
    assert all(isinstance(function, _Function) for function in taken), taken
    from spot_megatron.train.__main__ import main

    sys.exit(main(sys.argv[1:]))
