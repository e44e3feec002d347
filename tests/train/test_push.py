"""The upload to the hub, by huggingface_hub itself, against a local server that has the hub's addresses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spot_megatron.errors import RecipeError, TrainingError
from spot_megatron.train.push import check_token, model_card, push_to_hub
from tests.support import make_recipe

IDENTITY = {"num_pairs": 7, "digest of the pairs": "aa11", "digest of the initial weights": "bb22"}


class Hub(ThreadingHTTPServer):
    """Repositories and what was asked of them. Small files only: the real hub takes large ones by another way."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.is_down = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if not self.path.startswith("/api/models/"):  # what the client asks for about itself
            self._answer({})
            return
        name = self.path.removeprefix("/api/models/")
        self._answer({"id": name, "private": self.server.private[name], "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"somebody/{made['name']}"
            status = 409 if name in self.server.private else 200
            self.server.private.setdefault(name, made["visibility"] == "private")
            self._answer({"url": f"{self._host()}/{name}", "name": name}, status)
        elif self.path == "/api/validate-yaml":  # of the card
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            self._answer({"files": [each | {"shouldIgnore": False} for each in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                each = json.loads(line)
                if each["key"] == "file":
                    self.server.files[each["value"]["path"]] = base64.b64decode(each["value"]["content"])
            self._answer(
                {"commitUrl": f"{self._host()}/somebody/model/commit/{1:040}", "commitOid": "1" * 40, "success": True}
            )
        else:
            self._answer({"error": self.path}, 404)

    def _host(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        self.server.asked.append(f"{self.command} {self.path.split('?')[0]}")
        if self.path.startswith(("/api/models", "/api/repos")):
            self.server.tokens.add(self.headers.get("Authorization"))
        body = json.dumps({"error": "down"} if self.server.is_down else content).encode()
        self.send_response(403 if self.server.is_down else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        server.shutdown()


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "hf" / "extra").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "README.md", "extra/notes.txt", "SHA256SUMS"):
        (folder / "hf" / name).write_bytes(f"content of {name}".encode())
    names = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
    rows = [{"step": step, **dict.fromkeys(names, step / 8)} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "export.json").write_text('{"pairs": 24}')
    return folder


def recipe_of(run: Path, name: str = "model"):
    return make_recipe(run.parent, output=str(run), model={"hf": "Qwen/Qwen3-8B"}, export={"push_to_hub": name})


def test_the_folder_and_a_card_are_uploaded_to_a_private_repository(hub, run):
    recipe = recipe_of(run)
    assert (push_to_hub(recipe, run, IDENTITY) or "").endswith(f"/somebody/model/commit/{1:040}")
    assert hub.private == {"somebody/model": True}
    assert hub.tokens == {"Bearer hf_of_the_environment"}
    card = hub.files.pop("README.md").decode()
    sent = {path.relative_to(run / "hf").as_posix(): path.read_bytes() for path in (run / "hf").rglob("*.*")}
    assert hub.files == {name: data for name, data in sent.items() if name != "README.md"} | {
        "SHA256SUMS": b"content of SHA256SUMS"
    }
    assert card == model_card(recipe, run, IDENTITY)
    for text in (
        "base_model: Qwen/Qwen3-8B",
        "aa11",
        "bb22",
        "| reward_margin | 0.25 |",
        "name: spot_bco",
        '"pairs": 24',
    ):
        assert text in card, text


def test_an_upload_is_made_once_for_an_export(hub, run):
    push_to_hub(recipe_of(run), run, IDENTITY)
    asked = len(hub.asked)
    assert push_to_hub(recipe_of(run), run, IDENTITY) is None
    assert len(hub.asked) == asked
    (run / "hf" / "SHA256SUMS").write_text("another export")
    assert push_to_hub(recipe_of(run), run, IDENTITY) is not None


def test_a_public_repository_is_refused(hub, run):
    hub.private["somebody/model"] = False
    with pytest.raises(RecipeError, match="somebody/model exists and is public"):
        push_to_hub(recipe_of(run), run, IDENTITY)
    assert not hub.files


def test_a_failed_upload_is_made_again(hub, run):
    hub.is_down = True
    with pytest.raises(TrainingError, match=r"could not be uploaded .*retry the upload alone"):
        push_to_hub(recipe_of(run), run, IDENTITY)
    hub.is_down = False
    assert push_to_hub(recipe_of(run), run, IDENTITY) is not None


def test_a_missing_token_is_found_first(run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(RecipeError, match="HF_TOKEN is not set"):
        check_token(recipe_of(run))
