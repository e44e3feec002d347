"""File-to-file conversion: every family there and back, kills, faults, and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import random
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

from spot_megatron.errors import CheckpointError, WeightError
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
from tests.weights.models import FAMILIES, OTHER_FILES, make_folder
from tools.convert import convert, copy_files
from tools.convert.compare import differences
from tools.convert.convert import export_checkpoint, import_folder
from tools.convert.copy_files import JOURNAL
from tools.convert.copy_worker import FileCopier
from tools.convert.torch_dist import TorchDist

CASES = {family: {"family": family, "tied": False, "dtype": "mixed"} for family in FAMILIES} | {
    "tied": {"tied": True, "dtype": "bf16", "shard_size": "20KB"},
    "tied_moe": {"family": "qwen3_moe", "tied": True, "shard_size": "20KB"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    base = tmp_path_factory.mktemp("sources")
    return {name: make_folder(base / name, **options) for name, options in CASES.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    recipe = make_recipe(tmp_path_factory.mktemp("run"))
    with one_process(recipe):
        yield recipe


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """34 MB of weights: several batches and, with small files, many outputs."""
    sizes = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    return make_folder(tmp_path_factory.mktemp("large") / "model", tied=False, dtype="bf16", shard_size="9MB", **sizes)


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


def test_full_disk(large, tmp_path):
    """On a file system that is too small: refused before anything is written, and explained if it fills up later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(WeightError, match=r"GB are to be written, 0\.0\d GB are free"):
            import_folder(large, disk / "out")
        usage = shutil.disk_usage(disk)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copy_files.shutil, "disk_usage", lambda path: usage._replace(free=10**12))
            with pytest.raises(WeightError, match=r"is full .*No space left.*run the same command again"):
                import_folder(large, disk / "out")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_warning_names_weights_that_are_not_finite_in_both_directions(sources, tmp_path):
    source = tmp_path / "nan"
    shutil.copytree(sources["qwen3_moe"], source)
    tensors = load_file(source / "model.safetensors")
    names = ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors[names[0]][3, 5] = float("nan")
    tensors[names[1]][3, 5] = float("-inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = rf"NaN or infinity in the weights {names[0]}, {names[1]}$"
    with pytest.warns(UserWarning, match=expected):
        import_folder(source, tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match=expected):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert differences(source, tmp_path / "out") == []


def test_a_source_that_is_cut_short_meanwhile(large, tmp_path, monkeypatch):
    """The headers were sound; then a shard loses its end."""
    source = tmp_path / "source"
    shutil.copytree(large, source)
    run = copy_files._run

    def cut_first(*args):
        shard = max(source.glob("*.safetensors"))
        os.truncate(shard, shard.stat().st_size - 1000)
        return run(*args)

    monkeypatch.setattr(copy_files, "_run", cut_first)
    with pytest.raises(WeightError, match=r"safetensors ends at byte \d+: it was truncated"):
        import_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def cut(length):
    return lambda file: file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("metadata.json", Path.unlink, "metadata.json is missing"),
        (".metadata", cut(100), "damaged"),
        (".metadata", lambda file: file.write_bytes(b"cos\nsystem\n(S'false'\ntR."), "damaged"),
        ("__0_0.distcp", Path.unlink, "damaged or missing"),
        ("__0_0.distcp", cut(500), "damaged or missing"),
        ("__0_0.distcp", cut(-100), "damaged or missing"),
    ],
)
def test_damaged_checkpoints(sources, tmp_path, pattern, damage, message):
    """Found by the reader itself in a checkpoint without checksums, as Megatron-Core writes it."""
    import_folder(sources["qwen3"], tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / CHECKSUMS).unlink()
    damage(tmp_path / "checkpoint" / "model" / pattern)
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_models_checkpoint(sources, tmp_path):
    import_folder(sources["qwen3"], tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / CHECKSUMS).unlink()
    for name in ("llama", "qwen3_moe"):
        side_files = tmp_path / "checkpoint" / "hf"
        shutil.rmtree(side_files)
        save_side_files(sources[name], tmp_path / "checkpoint")
        with pytest.raises(CheckpointError, match="another model"):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)


def test_damage_of_any_file_of_a_checkpoint_is_named(sources, tmp_path):
    """Bits flipped and bytes cut in every file, at the same length where the file allows it."""
    checkpoint, generator = tmp_path / "checkpoint", random.Random(0)
    import_folder(sources["qwen3"], checkpoint)
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()]
    assert {"model/.metadata", "model/metadata.json", "hf_dtypes.json", CHECKSUMS} <= {*map(str, names)}
    for name in names:
        original = (checkpoint / name).read_bytes()
        position = generator.randrange(len(original))
        flipped = bytes([original[position] ^ 1 << generator.randrange(8)])
        for damaged in (original[:position] + flipped + original[position + 1 :], original[:position]):
            (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                export_checkpoint(checkpoint, tmp_path / "out", shard_gb=5)
            assert CHECKSUMS in str(caught.value)
            assert name.name in str(caught.value) or name.name == CHECKSUMS
        (checkpoint / name).write_bytes(original)
    export_checkpoint(checkpoint, tmp_path / "out", shard_gb=5)
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        import_folder(tmp_path / "out", tmp_path / "again")
    with pytest.raises(WeightError, match=r"model\.safetensors is damaged"):
        HFFolder(tmp_path / "out").digest()
    assert not (tmp_path / "again").exists()


def test_a_tokenizer_of_sentencepiece_alone_comes_back(sources, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(sources["llama"], source, ignore=shutil.ignore_patterns("tokenizer*"))
    (source / "tokenizer.model").write_bytes(b"\n\x0b\n\x05<unk>\x15\0\0\0\0\x18\x02")
    import_folder(source, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=5)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert differences(source, tmp_path / "out") == []
