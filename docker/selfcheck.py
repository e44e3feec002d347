"""Checks the software of the image, or of any machine with GPUs: versions, imports, FP8, NVLink.

The last step of docker build, and part of `make doctor`. Runs without PyTorch, to report what is missing.

    python3 docker/selfcheck.py                              everything; exit code 1 where something fails
    python3 docker/selfcheck.py --build --expect NAME==1.2   without a driver: GPU checks are listed, not run
    python3 docker/selfcheck.py --has NAME ">=1,<2"          exit code 0 if it is installed in that range
    python3 docker/selfcheck.py --requirements pyproject.toml   packages to install besides torch and megatron-core
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "transformers", "triton")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="no GPU is expected here")
    parser.add_argument("--expect", nargs="+", default=[], metavar="NAME==VERSION")
    parser.add_argument("--has", nargs=2, metavar=("NAME", "RANGE"))
    parser.add_argument("--requirements", metavar="PYPROJECT")
    options = parser.parse_args(arguments)
    if options.has:
        return 0 if satisfies(*options.has) else 1
    if options.requirements:
        print("\n".join(requirements(Path(options.requirements))))
        return 0
    for name in PACKAGES:
        print(f"  {name:<24}{installed(name) or 'not installed'}")
    failed = [check for check in (*expected(options.expect), *CHECKS) if not passes(check, options.build)]
    print(f"{len(failed)} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def satisfies(name: str, specifiers: str) -> bool:
    found = installed(name)
    return found is not None and SpecifierSet(specifiers).contains(found, prereleases=True)


def requirements(pyproject: Path) -> list[str]:
    """The project's dependencies with those of its tests, except what the image brings or pins itself."""
    import tomllib

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return [line for line in wanted if Requirement(line).name not in ("torch", "megatron-core")]


class NeedsGpu(Exception):
    """The check needs a GPU, which this machine does not have."""


def passes(check: Callable[[], str], build: bool) -> bool:
    """Runs a check and prints its line. Any exception is its result, so all are caught."""
    try:
        print(f"  ok    {check()}")
    except NeedsGpu as error:
        print(f"  {'later' if build else 'no   '} {error}")
        return build
    except Exception as error:
        print(f"  FAIL  {check.__doc__}: {type(error).__name__}: {error}")
        return False
    return True


def expected(lines: list[str]) -> list[Callable[[], str]]:
    """One check for each `NAME==VERSION`."""

    def make(line: str) -> Callable[[], str]:
        def check() -> str:
            requirement = Requirement(line)
            found = installed(requirement.name)
            assert satisfies(requirement.name, str(requirement.specifier)), f"found {found}"
            return f"{requirement.name} {found}"

        check.__doc__ = line
        return check

    return [make(line) for line in lines]


# (package, range, other package, range, what goes wrong where both are installed)
KNOWN_BAD = (
    (
        "megatron-core", "<=0.18.2", "transformer-engine", ">=2.13",
        "without a correction the gradient norm counts the experts of one tensor rank only (Megatron-LM issue 5916)",
    ),
    (
        "transformer-engine", "<2.21", "flash-attn", ">=2.8.4",
        "Transformer Engine uses flash-attn below 2.8.4 only, and runs slower kernels otherwise without an error",
    ),
)  # fmt: skip


def versions() -> str:
    """versions that work together"""
    for package, specifier, other, other_specifier, consequence in KNOWN_BAD:
        if satisfies(package, specifier) and satisfies(other, other_specifier):
            raise AssertionError(
                f"{package} {installed(package)} with {other} {installed(other)}: {consequence}. Install {other} "
                f"outside {other_specifier}, or {package} outside {specifier}"
            )
    return "no pair of versions that is known to be wrong"


def gpu() -> str:
    """GPU"""
    import torch

    if not torch.cuda.is_available():
        raise NeedsGpu("no CUDA device here")
    number, name = torch.cuda.device_count(), torch.cuda.get_device_name()
    return f"{number} x {name}, CUDA {torch.version.cuda}"


def megatron() -> str:
    """Megatron-Core imports"""
    importlib.import_module("megatron.core.models.gpt")
    return f"megatron-core {version('megatron-core')} imports"


def transformer_engine() -> str:
    """Transformer Engine imports"""
    import torch

    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        if torch.cuda.is_available():
            raise
        raise NeedsGpu(f"Transformer Engine does not import without a driver: {error}") from None
    return f"Transformer Engine {version('transformer-engine')} imports"


def fp8() -> str:
    """FP8"""
    gpu()
    from transformer_engine.pytorch import fp8

    tensorwise, why = fp8.check_fp8_support()
    assert tensorwise, why
    blockwise, why = fp8.check_fp8_block_scaling_support()
    return "FP8 tensorwise" + (" and blockwise" if blockwise else f"; not blockwise: {why}")


def flash_attention() -> str:
    """flash-attn imports"""
    importlib.import_module("flash_attn")
    return f"flash-attn {version('flash-attn')} imports"


def apex() -> str:
    """apex is NVIDIA's or absent"""
    fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if installed("apex"):
        assert "pyramid" not in (metadata("apex")["Summary"] or "").lower(), "PyPI's apex is another program: remove it"
    return f"NVIDIA apex: {'fused weight gradients' if fused else 'absent, weight gradients are not fused'}"


def nvlink() -> str:
    """NVLink"""
    gpu()
    command = ["nvidia-smi", "nvlink", "--status", "-i", "0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    speeds = [float(line.split(":")[1].split()[0]) for line in lines if "GB/s" in line]
    return f"NVLink: {len(speeds)} links, {2 * sum(speeds):.0f} GB/s both ways (H100 900, H800 400)"


CHECKS: tuple[Callable[[], str], ...] = (
    versions,
    gpu,
    megatron,
    transformer_engine,
    fp8,
    flash_attention,
    apex,
    nvlink,
)

if __name__ == "__main__":
    sys.exit(main())
