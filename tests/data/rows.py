"""Rows of every pair format."""

import json
from pathlib import Path
from typing import Any

SPOT = {"id": "a", "prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
TOKEN_IDS = {"id": "a", "prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [4, 9]}
USER = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "It is 5."}
TRL = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
VISUAL = {"question": "2+2?", "gemini_corrected_answer": "It is 4.", "original_answer": "It is 5."}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
