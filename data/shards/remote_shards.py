"""Members of remote shards: through the node's cache, and fetched ahead in the background."""

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from longtake.data.config import CacheConfig
from longtake.data.shards import Span
from longtake.data.shards.node_cache import Claim, NodeCache, cache_folder
from longtake.data.shards.remote import RemoteFolder, StorageError

MAX_GAP = 2**16
"""Members this near to each other are fetched as one range."""

# One group of ranges is fetched at once; a read that needs one of them waits for the group.
_GROUP_RANGES, _GROUP_BYTES = 32, 2**24
# The share of the cache that one process fills ahead of its reads: several ranks share a node.
_AHEAD = 1 / 16

PAUSE = 5.0
"""Seconds that the background thread waits after a failure."""


@dataclass(frozen=True)
class Range:
    """Bytes start..stop of a shard."""

    shard: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def merge_spans(shard: str, spans: Iterable[Span]) -> list[Range]:
    """The fewest ranges that hold all spans without reading over a gap of more than MAX_GAP."""
    bounds: list[list[int]] = []
    for span in sorted(spans, key=lambda span: span.offset):
        if bounds and span.offset - bounds[-1][1] <= MAX_GAP:
            bounds[-1][1] = max(bounds[-1][1], span.offset + span.size)
        else:
            bounds.append([span.offset, span.offset + span.size])
    return [Range(shard, start, stop) for start, stop in bounds]


class RemoteShards:
    """Reads of one process from the shards at `url`; see `Shards`.

    Its background thread starts when it is first asked for something.
    """

    def __init__(self, url: str, cache: CacheConfig) -> None:
        self.pid = os.getpid()
        self._folder = RemoteFolder(url, cache)
        self._patience = cache.timeout
        self._cache = NodeCache(cache_folder(cache) / "samples", cache.max_bytes)
        self._sizes = _Sizes(self._folder)
        budget = int(cache.max_bytes * _AHEAD)
        self._ahead = _FetchAhead(self._folder, self._cache, self._sizes, budget)
        self._finalize = weakref.finalize(self, self._ahead.stop)

    def read(self, shard: str, spans: Sequence[Span], shard_bytes: int | None) -> list[bytes]:
        """As of `Shards.read`."""
        self._sizes.expect(shard, shard_bytes)
        found = [(part, self._fetch(part)) for part in merge_spans(shard, spans)]
        return [_cut(found, span) for span in spans]

    def prefetch(self, wanted: Sequence[tuple[str, Sequence[Span]]]) -> None:
        """As of `Shards.prefetch`."""
        self._ahead.replace(part for each in wanted for part in merge_spans(*each))

    def forget(self, shard: str, spans: Sequence[Span]) -> bool:
        """As of `Shards.forget`."""
        names = [self._sizes.name(part) for part in merge_spans(shard, spans)]
        return sum(map(self._cache.drop, names)) > 0

    def close(self) -> None:
        """Stop the thread; what it is fetching just now it finishes."""
        self._finalize()
        self._cache.close()

    def _fetch(self, part: Range) -> bytes:
        def load() -> bytes:
            self._sizes.check(part.shard)
            return self._folder.read_range(part.shard, part.start, part.stop)

        return self._cache.fetch(self._sizes.name(part), len(part), load, self._patience)


class _Sizes:
    """Bytes of each shard, as the catalogue says and as the store says."""

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self._expected: dict[str, int] = {}
        self._found: dict[str, int | None] = {}

    def expect(self, shard: str, size: int | None) -> None:
        if size is not None:
            self._expected[shard] = size

    def check(self, shard: str) -> None:
        """Ask the store, once.

        Raises:
            StorageError: it says otherwise than the catalogue.
        """
        if shard not in self._found:
            self._found[shard] = self._folder.size(shard)
        found, expected = self._found[shard], self._expected.get(shard)
        if None not in (found, expected) and found != expected:
            raise StorageError(
                f"{self._folder.url}/{shard}: has {found} bytes, the catalogue says {expected}: "
                f"changed after indexing; run `longtake index {self._folder.url}`"
            )

    def name(self, part: Range) -> str:
        """The cache's name of a range: another size is another shard."""
        size = self._expected.get(part.shard) or self._found.get(part.shard)
        parts = (self._folder.url, part.shard, part.start, part.stop, size)
        return xxhash.xxh3_128_hexdigest("\0".join(map(str, parts)).encode())


class _FetchAhead:
    """The background thread and what it is to fetch."""

    def __init__(
        self, folder: RemoteFolder, cache: NodeCache, sizes: _Sizes, max_bytes: int
    ) -> None:
        self._folder, self._cache, self._sizes = folder, cache, sizes
        self._max_bytes = max_bytes
        self._wanted: deque[Range] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def replace(self, parts: Iterable[Range]) -> None:
        """Fetch these, in order, up to `max_bytes` of them."""
        wanted, total = deque[Range](), 0
        for part in parts:
            total += len(part)
            if total > self._max_bytes:
                break
            wanted.append(part)
        with self._changed:
            self._wanted = wanted
            self._changed.notify()
        if self._thread is None and wanted:
            self._thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._stopped)
                if self._stopped:
                    return
                group = self._next_group()
            if not self._fetch(group):
                with self._changed:  # the read that needs it tries again, patiently, and reports
                    self._changed.wait(PAUSE)

    def _next_group(self) -> list[Range]:
        # Before ranges are known to work one fetch may bring a whole shard: not 32 of them.
        limit = _GROUP_RANGES if self._folder.ranges_work else 1
        group, total = [], 0
        while self._wanted and len(group) < limit and total < _GROUP_BYTES:
            group.append(self._wanted.popleft())
            total += len(group[-1])
        return group

    def _fetch(self, group: list[Range]) -> bool:
        """Whether all went well."""
        claims: dict[Range, Claim] = {}
        try:
            for part in group:
                self._sizes.check(part.shard)
                claim = self._claim(part)
                if claim is not None:
                    claims[part] = claim
            found = self._folder.try_ranges([(p.shard, p.start, p.stop) for p in claims])
            for part, data in zip(list(claims), found, strict=True):
                if data is not None:
                    self._cache.keep(claims.pop(part), data)
        except Exception:  # no thread to raise it in; see _run
            return False
        else:
            return not claims
        finally:
            for claim in claims.values():
                self._cache.release(claim)

    def _claim(self, part: Range) -> Claim | None:
        name = self._sizes.name(part)
        try:
            return None if self._cache.has(name) else self._cache.claim(name, len(part))
        except BlockingIOError:
            return None


def _cut(found: Sequence[tuple[Range, bytes]], span: Span) -> bytes:
    stop = span.offset + span.size
    part, data = next(f for f in found if f[0].start <= span.offset and stop <= f[0].stop)
    return data[span.offset - part.start : stop - part.start]
