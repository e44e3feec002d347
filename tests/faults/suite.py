"""All faults, and the numbers of each."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import programs, world
from tests.faults.damage import damage
from tests.faults.kills import kill_often
from tests.faults.table import Table
from tests.tools.pairs.support import oracle_server, write_questions

SHARES = {"train": 60, "reference": 30, "import": 30, "export": 30, "elicit": 30, "rectify": 25, "evaluation": 15}
SHARES["train_async"] = 30
RECIPE_KEYS = ("recipe.yaml", "was written under another recipe", "unknown key", "model.hf", "data.pairs")


def run_suite(folder: Path, parts: Sequence[str], kills: int, damages: int, rng: random.Random) -> Table:
    programs.preload()
    table = Table()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        needs_server = ({"elicit", "rectify"} & set(parts) and kills) or ("damage" in parts and damages)
        url = stack.enter_context(oracle_server("--wrong-rate", "0.5", "--latency-ms", "20")) if needs_server else ""
        base = Base(folder / "base", url)
        for part in parts:
            if part in SHARES:
                count = round(kills * SHARES[part] / sum(SHARES[name] for name in parts if name in SHARES))
                if count:
                    kill_part(part, count, base, folder / part, rng, table)
        if "damage" in parts and damages:
            damage_runs(base, damages, rng, table)
            damage_folders(base, damages, rng, table)
            damage_journals(base, damages, rng, table)
        if "world" in parts:
            number = 1 + damages // 2
            world.full_disk(folder / "world", base.recipe, base.expected, number, rng, table)
            world.read_only(folder / "world", base.recipe, table)
            world.two_runs(folder / "two", base.recipe, base.expected, table)
            world.rank_killed(folder / "ranks", base.recipe, number, rng, table)
    return table


class Base:
    """Undisturbed runs, made when they are first asked for."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        folder.mkdir(parents=True)
        self.recipe = programs.write_recipe(folder)
        self.questions = folder / "questions.jsonl"
        write_questions(self.questions, 60)
        self._expected: dict[str, Any] | None = None

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def expected(self) -> dict[str, Any]:
        """The results of the training run."""
        if self._expected is None:
            code, output = programs.train(self.run, self.recipe).run(self.folder / "train.txt")
            assert code == 0, output
            self._expected = programs.trained(self.run)
        return self._expected

    @property
    def checkpoint(self) -> Path:
        assert self.expected
        return self.run / "checkpoints" / f"step_{programs.NUM_STEPS - programs.SAVE_EVERY:08d}"

    @property
    def errors(self) -> Path:
        """The errors.jsonl of an undisturbed elicitation."""
        output = self.folder / "elicited"
        if not output.exists():
            code, text = programs.elicit(self.questions, self.url, output).run(self.folder / "elicit.txt")
            assert code == 0, text
        return output / "errors.jsonl"


def kill_part(part: str, count: int, base: Base, folder: Path, rng: random.Random, table: Table) -> None:
    makers = {
        "train": lambda output: programs.train(output, base.recipe),
        "train_async": lambda output: programs.train(output, base.recipe, changes=["checkpoint.async=true"]),
        "reference": lambda output: programs.train(output, base.recipe, num_steps=1),
        "import": lambda output: programs.convert("import", base.folder / "model", output),
        "export": lambda output: programs.convert("export", base.checkpoint, output),
        "elicit": lambda output: programs.elicit(base.questions, base.url, output),
        "rectify": lambda output: programs.rectify(base.errors, base.url, output),
        "evaluation": lambda output: programs.evaluate(base.folder / "model", few(base), output.parent / "log.txt"),
    }

    def in_reference_pass(program: programs.Program) -> bool:
        beat = program.folder / "heartbeat" / "rank_0"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(beat.read_text())["doing"] == "reference pass"
        return False

    options: dict[str, Any] = {"starts_at": in_reference_pass} if part == "reference" else {}
    if part in ("elicit", "rectify"):
        options["share"] = 0.4
    name = "reference pass" if part == "reference" else part
    kill_often(makers[part], count, folder, rng, table, name, **options)


def few(base: Base) -> Path:
    path = base.folder / "few.jsonl"
    if not path.exists():
        rows = (programs.TINY / "heldout.jsonl").read_text().splitlines(keepends=True)[:6]
        path.write_text("".join(rows))
    return path


def damage_runs(base: Base, count: int, rng: random.Random, table: Table) -> None:
    """A run whose newest checkpoint is that of step 4 of 6 continues from damaged files."""
    origin = base.folder.with_name("stopped")
    expected = base.expected
    shutil.copytree(base.folder, origin)
    shutil.rmtree(origin / "run" / "hf")
    (origin / "run" / "finished.json").unlink()
    text = (origin / "recipe.yaml").read_text()
    place = str(origin.with_name("stopped_damaged"))
    (origin / "recipe.yaml").write_text(text.replace(str(base.folder), place))
    # the identity in each checkpoint names the folders of model and pairs
    for state in origin.glob("run/checkpoints/*/state.json"):
        state.write_text(state.read_text().replace(str(base.folder), place))
        sums = state.with_name("SHA256SUMS")
        sums.unlink()
        from spot_megatron.hf.checksums import file_names, sums_of, write_checksums

        write_checksums(state.parent, sums_of(state.parent, file_names(state.parent)))
    step = "run/checkpoints/step_00000004"
    cache = next((origin / "reference_cache").glob("*.jsonl")).name
    files = {
        "checkpoint, weights": (f"{step}/model/__0_0.distcp", ["__0_0.distcp"]),
        "checkpoint, weights' .metadata": (f"{step}/model/.metadata", ["model/.metadata"]),
        "checkpoint, weights' metadata.json": (f"{step}/model/metadata.json", ["model/metadata.json"]),
        "checkpoint, weights' common.pt": (f"{step}/model/common.pt", ["model/common.pt"]),
        "checkpoint, optimizer": (f"{step}/optimizer/__0_0.distcp", ["__0_0.distcp"]),
        "checkpoint, optimizer's .metadata": (f"{step}/optimizer/.metadata", ["optimizer/.metadata"]),
        "checkpoint, state.json": (f"{step}/state.json", ["state.json"]),
        "checkpoint, SHA256SUMS": (f"{step}/SHA256SUMS", ["SHA256SUMS"]),
        "reference cache": (f"reference_cache/{cache}", [cache]),
        "recipe, on resume": ("recipe.yaml", RECIPE_KEYS),
        "pairs, on resume": ("pairs.jsonl", ["pairs.jsonl", "data.pairs"]),
        "model.safetensors, on resume": ("model/model.safetensors", ["model.safetensors", "weights of model.hf"]),
        "config.json, on resume": ("model/config.json", ["config.json", "weights of model.hf"]),
        "tokenizer.json, on resume": ("model/tokenizer.json", ["tokenizer", "data.pairs"]),
        "metrics.jsonl": ("run/metrics.jsonl", ["metrics.jsonl"]),
    }
    for kind, (file, names) in files.items():
        if (origin / file).exists():
            wanted = {key: value for key, value in expected.items() if kind != "metrics.jsonl" or key != "metrics"}
            damage(kind, origin, file, lambda work: train_at(work, kind), wanted, names, count, rng, table)  # noqa: B023


def train_at(work: Path, kind: str) -> programs.Program:
    program = programs.train(work / "run", work / "recipe.yaml")
    if kind == "metrics.jsonl":  # a log: values in it are not protected, only that it can be read
        return programs.Program(
            program.kind, program.main, program.arguments, program.folder, without_metrics, program.is_sound
        )
    return program


def without_metrics(run: Path) -> dict[str, Any]:
    return {key: value for key, value in programs.trained(run).items() if key != "metrics"}


def damage_folders(base: Base, count: int, rng: random.Random, table: Table) -> None:
    """Conversions of damaged folders."""
    source = base.folder.with_name("source")
    source.mkdir()
    shards = programs.convert("export", base.checkpoint, source / "hf", shard_gb=0.0005)
    code, output = shards.run(source / "log.txt")
    assert code == 0, output
    shutil.copytree(base.checkpoint, source / "checkpoint")
    importing = programs.convert("import", source / "hf", source / "imported")
    exporting = programs.convert("export", source / "checkpoint", source / "exported")
    for program in (importing, exporting):
        code, output = program.run(source / "log.txt")
        assert code == 0, output
    imported, exported = (program.results(program.folder) for program in (importing, exporting))
    for program in (importing, exporting):
        shutil.rmtree(program.folder)
    shard = sorted((source / "hf").glob("*.safetensors"))[0].name
    index = "model.safetensors.index.json"

    def importer(work: Path) -> programs.Program:
        return programs.convert("import", work / "hf", work / "imported")

    def exporter(work: Path) -> programs.Program:
        return programs.convert("export", work / "checkpoint", work / "exported")

    for kind, file, names in (
        ("import, safetensors", f"hf/{shard}", [shard]),
        ("import, index", f"hf/{index}", [index]),
        ("import, SHA256SUMS", "hf/SHA256SUMS", ["SHA256SUMS", shard, index, "is missing"]),
    ):
        damage(kind, source, file, importer, imported, names, count, rng, table)
    for name in ("model/__0_0.distcp", "model/.metadata", "SHA256SUMS", "hf_dtypes.json"):
        damage(
            f"export, {name}", source, f"checkpoint/{name}", exporter, exported, [name, "SHA256SUMS"], count, rng, table
        )


def damage_journals(base: Base, count: int, rng: random.Random, table: Table) -> None:
    """Finished stages of the data half are started again on damaged journals."""
    for stage, journal in (("elicit", "responses.jsonl"), ("rectify", "journal.jsonl")):
        origin = base.folder.with_name(f"{stage}ed")
        origin.mkdir()

        def make(work: Path, stage: str = stage) -> programs.Program:
            if stage == "elicit":
                return programs.elicit(base.questions, base.url, work / "out")
            return programs.rectify(base.errors, base.url, work / "out")

        program = make(origin)
        code, output = program.run(origin / "log.txt")
        assert code == 0, output
        expected = program.results(program.folder)
        for name in (journal, f"{journal}.settings.json"):
            damage(f"{stage}, {name}", origin, f"out/{name}", make, expected, [name], count, rng, table)
