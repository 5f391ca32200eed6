"""Ranks that compute samples together read them once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from longtake.data.batch_bytes import from_bytes, to_bytes
from longtake.data.loader import Batch
from longtake.train.ranks import Ranks


def read_once(batches: Iterable[Batch], count: int, ranks: Ranks) -> Iterator[Batch]:
    """`count` batches, on every rank of a sequence group those of its reader, one at a time.

    The others take nothing from their own `batches`. All ranks of a group go on together.
    """
    if ranks.sequence_group is None:
        yield from batches
        return
    readable = iter(batches)
    for _ in range(count):
        if ranks.is_reader:
            batch = next(readable)
            ranks.share(to_bytes(batch))
            yield batch
        else:
            yield from_bytes(ranks.share(b""))
