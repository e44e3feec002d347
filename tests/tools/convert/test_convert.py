"""File-to-file conversion: every family there and back, kills, and what it costs."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from spot_megatron.hf.checksums import CHECKSUMS
from spot_megatron.hf.config import read_hf_config
from spot_megatron.hf.folder import HFFolder
from spot_megatron.hf.side_files import save_side_files
from spot_megatron.model.config import transformer_config
from spot_megatron.model.gpt import build_model
from spot_megatron.weights.checkpoint import load_model, save_model
from spot_megatron.weights.load import load_hf
from tests.processes import ROOT
from tests.support import make_recipe, one_process
from tests.tools.convert.conftest import CASES
from tests.weights.models import OTHER_FILES
from tools.convert import convert
from tools.convert.compare import differences
from tools.convert.convert import export_checkpoint, import_folder
from tools.convert.copy_files import JOURNAL
from tools.convert.copy_worker import FileCopier
from tools.convert.torch_dist import TorchDist


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    recipe = make_recipe(tmp_path_factory.mktemp("run"))
    with one_process(recipe):
        yield recipe


def filled(folder, recipe, fill):
    config = read_hf_config(folder)
    chunks = build_model(transformer_config(config, recipe, "cpu"), config)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("inf"))
    fill(chunks, config)
    return chunks


@pytest.mark.parametrize("case", CASES)
def test_megatron_reads_what_is_imported_and_we_read_what_megatron_writes(sources, world, tmp_path, case):
    """Both checkpoints hold the same parameters, and both become the folder they came from, bit for bit."""
    source = sources[case]
    import_folder(source, tmp_path / "ours")
    direct = filled(source, world, lambda chunks, config: load_hf(chunks, HFFolder(source), config))
    loaded = filled(source, world, lambda chunks, config: load_model(chunks, tmp_path / "ours" / "model"))
    for (name, left), (_, right) in zip(direct[0].named_parameters(), loaded[0].named_parameters(), strict=True):
        assert torch.equal(left, right), name
    save_model(direct, tmp_path / "theirs" / "model")
    save_side_files(source, tmp_path / "theirs")
    for checkpoint in ("ours", "theirs"):
        export_checkpoint(tmp_path / checkpoint, tmp_path / "out", shard_gb=1e-4)
        assert differences(source, tmp_path / "out") == []
        for name in OTHER_FILES:
            assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
        shutil.rmtree(tmp_path / "out")


def test_types_that_differ_within_a_matrix(sources, tmp_path):
    """One layer in float32, one projection in float16: the checkpoint widens, the export narrows to the same bits."""
    source = tmp_path / "odd"
    shutil.copytree(sources["qwen3"], source)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "layers.2." in name and "weight" in name:
            tensors[name] = tensors[name].float() + torch.rand_like(tensors[name].float()) * 1e-3
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.randn(64, 64).half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_folder(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert differences(source, tmp_path / "out") == []


def test_checksums_are_those_of_sha256sum(sources, tmp_path):
    import_folder(sources["tied"], tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=3e-5)
    for folder in ("checkpoint", "out"):
        lines = (tmp_path / folder / CHECKSUMS).read_text().splitlines()
        files = {str(p.relative_to(tmp_path / folder)) for p in (tmp_path / folder).rglob("*") if p.is_file()}
        assert {line.split("  ", 1)[1] for line in lines} == files - {CHECKSUMS}
        for line in lines:
            digest, name = line.split("  ", 1)
            assert hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest() == digest


def command(*arguments):
    return [sys.executable, "-m", "tools.convert", *map(str, arguments)]


SMALL_FILES = "import sys; from tools.convert import convert; convert.CHECKPOINT_FILE_BYTES = 1 << 21; "
SMALL_FILES += "from tools.convert.__main__ import main; sys.exit(main(sys.argv[1:]))"


def test_a_killed_import_resumes(large, tmp_path):
    """Killed with -9 in the middle: nothing is published, no process stays, finished files are kept as they are."""
    arguments = ["import", "--hf", large, "--output", tmp_path / "out", "--workers", "1"]
    start = [sys.executable, "-c", SMALL_FILES, *map(str, arguments)]
    partial = tmp_path / ".out.partial" / "model"
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(partial.glob("__*.distcp")) if partial.is_dir() else []) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(children, timeout=10)
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / "out").exists()
    noted = (partial / JOURNAL).read_text().splitlines()[1:]
    names = [json.loads(line)["name"] for line in noted]
    assert 3 <= len(names) < 15
    spoiled = partial / names[0]
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"?")
    before = {name: (partial / name).stat().st_mtime_ns for name in names}

    result = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert f"{len(names) - 1} of " in result.stderr
    model = tmp_path / "out" / "model"
    assert [name for name in names if (model / name).stat().st_mtime_ns != before[name]] == names[:1]
    assert not list((tmp_path / "out").rglob(".*[0-9]"))
    export_checkpoint(tmp_path / "out", tmp_path / "back", shard_gb=5)
    assert differences(large, tmp_path / "back") == []


def test_another_source_starts_anew(sources, tmp_path, monkeypatch):
    """Files of an interrupted conversion of another model are not used."""

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_folder(sources["llama"], tmp_path / "out")
    monkeypatch.undo()
    import_folder(sources["qwen2"], tmp_path / "out")
    export_checkpoint(tmp_path / "out", tmp_path / "back", shard_gb=5)
    assert differences(sources["qwen2"], tmp_path / "back") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]


def test_memory_of_all_processes_together(large, tmp_path):
    """At most 256 MB that are not files' pages, in both directions."""
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    importing = command("import", "--hf", large, "--output", checkpoint, "--workers", "2")
    assert peak_anonymous_bytes(importing) < 256e6
    assert peak_anonymous_bytes(command("export", "--checkpoint", checkpoint, "--output", back)) < 256e6


def peak_anonymous_bytes(arguments):
    """Of a program and its children, sampled every 5 ms."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        anonymous = 0
        for pid in [process.pid, *(c.pid for c in psutil.Process(process.pid).children(recursive=True))]:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            anonymous += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
        peak = max(peak, anonymous)
        time.sleep(0.005)
    assert process.returncode == 0
    return peak


def test_every_byte_is_read_once_and_written_once(large, tmp_path):
    import_folder(large, tmp_path / "checkpoint")
    config, kinds = read_hf_config(large), HFFolder(large).kinds()
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    imports, _ = convert.plan_import(HFFolder(large), config)
    exports, _ = convert.plan_export(TorchDist(tmp_path / "checkpoint" / "model"), config, kinds, 10**7)
    copier = FileCopier(tmp_path, lambda count: None)
    for files in (imports, exports):
        before = bytes_moved()
        for file in files:
            copier.write(file)
        assert 1.99 * weights < bytes_moved() - before < 2.05 * weights


def bytes_moved():
    """Read and written by this process."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"]) + int(counters["wchar"])


def test_a_tokenizer_of_sentencepiece_alone_comes_back(sources, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(sources["llama"], source, ignore=shutil.ignore_patterns("tokenizer*"))
    (source / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>\x15\0\0\0\0\x18\x02")
    import_folder(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert differences(source, tmp_path / "out") == []
