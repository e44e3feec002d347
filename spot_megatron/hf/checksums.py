"""SHA256SUMS: the SHA-256 of every file in a folder, in the format of `sha256sum -c`. Does not import PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from spot_megatron.errors import UserError, WeightError
from spot_megatron.files import file_sha256, write_text

CHECKSUMS = "SHA256SUMS"
NUM_THREADS = 4  # hashlib releases the GIL
REMEDY = f"use another copy of the folder, or delete {CHECKSUMS} if you changed the folder on purpose"


def sums_of(folder: Path, names: Sequence[str], num_threads: int = NUM_THREADS) -> dict[str, str]:
    """{name: SHA-256 in hex} of files, by their paths relative to `folder`."""
    with ThreadPoolExecutor(num_threads) as threads:
        return dict(zip(names, threads.map(lambda name: file_sha256(folder / name), names), strict=True))


def file_names(folder: Path) -> list[str]:
    """Relative paths of the files in a folder and its subfolders, without SHA256SUMS, the largest first."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS]
    files.sort(key=lambda path: (-path.stat().st_size, path))
    return [path.relative_to(folder).as_posix() for path in files]


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes SHA256SUMS, atomically."""
    write_text(folder / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_checksums(folder: Path, error: type[UserError]) -> dict[str, str]:
    """{name: SHA-256} of SHA256SUMS; empty if the folder has none. Raises `error` if it is damaged."""
    file = folder / CHECKSUMS
    if not file.exists():
        return {}
    sums: dict[str, str] = {}
    try:
        text = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{file} cannot be read: {reason}") from None
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](\S.*)", line)
        if match is None or match[2] in sums or not _is_inside(match[2]):
            raise error(
                f"{file} is damaged in line {number}: it must be a SHA-256 and a path inside the folder; {REMEDY}"
            )
        sums[match[2]] = match[1]
    if not text.endswith("\n"):
        raise error(f"{file} is damaged: it ends within a line; {REMEDY}")
    return sums


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def verify_checksums(
    folder: Path, error: type[UserError], num_threads: int = NUM_THREADS, rank: int = 0, world_size: int = 1
) -> None:
    """Compares the files of a folder with its SHA256SUMS, if it has one. A rank reads every `world_size`-th file.

    Raises:
        error: a file is missing, differs, or is not in SHA256SUMS.
    """
    sums = read_checksums(folder, error)
    if not sums and not (folder / CHECKSUMS).exists():
        return
    present = file_names(folder)
    for name in sorted(sums.keys() ^ set(present)):
        reason = f"is missing, but {CHECKSUMS} lists it" if name in sums else f"is not in {CHECKSUMS}"
        raise error(f"{folder / name} {reason}; {REMEDY}")
    refuse_differing(folder, sums_of(folder, present[rank::world_size], num_threads), sums, error)


def verify_weights(folder: Path, num_threads: int = NUM_THREADS) -> None:
    """Compares the weight files of a Hugging Face folder with its SHA256SUMS, if it has one.

    Other files may differ: users edit config.json or add a chat template.

    Raises:
        WeightError: a weight file is missing or differs.
    """
    sums = {name: digest for name, digest in read_checksums(folder, WeightError).items() if is_weight_file(name)}
    for name in sums:
        if not (folder / name).is_file():
            raise WeightError(f"{folder / name} is missing, but {CHECKSUMS} lists it; {REMEDY}")
    refuse_differing(folder, sums_of(folder, list(sums), num_threads), sums, WeightError)


def is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def refuse_differing(folder: Path, found: Mapping[str, str], sums: Mapping[str, str], error: type[UserError]) -> None:
    """Raises `error` for the first file whose SHA-256 is not that of SHA256SUMS."""
    for name in sorted(found):
        if sums.get(name, found[name]) != found[name]:
            raise error(f"{folder / name} is damaged: its SHA-256 is not the one in {CHECKSUMS}; {REMEDY}")
