"""Joins the journals of shards that machines sampled apart."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from spot_megatron.errors import PairError
from spot_megatron.files import Row
from tools.pairs.elicit import JOURNAL
from tools.pairs.journal import Journal
from tools.pairs.sampling import Sampling, read_sampling


def merge(output: Path, shard_journals: Sequence[Path]) -> Sampling:
    """Copy the records of shard journals into `output`/responses.jsonl and return the settings that they share.

    Records that are already there are not copied again, so a merge may be repeated. Raises PairError when the shards
    were made with different settings.
    """
    settings = []
    for path in shard_journals:
        settings.append(asdict(read_sampling(path)))
        if settings[-1] != settings[0]:
            raise PairError(
                f"{path} was made with other settings than {shard_journals[0]}. Shards of one run only can be merged."
            )
    with Journal(output / JOURNAL, settings[0]) as merged:
        known = {_record_key(record) for _, record in merged.records()}
        for path in shard_journals:
            with Journal(path, settings[0]) as shard:  # its lock: a shard that is still running is not merged
                for _, record in shard.records():
                    if _record_key(record) not in known:
                        merged.append(record)
        return Sampling(**settings[0])


def _record_key(record: Row) -> bytes:
    """A digest, so that a merge does not hold all texts."""
    key = [record.get(name) for name in ("id", "sample", "response", "failed")]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
