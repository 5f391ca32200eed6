"""How large an encode will be and how long it takes: before it starts, and while it runs."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from longtake.data.latents import LatentManifest, LatentSample, latent_members
from longtake.data.reader import BadSample, SampleReader
from longtake.data.segments import Segment
from longtake.models.text import TextConfig, Tokenizer, embed_dim
from longtake.train.encode_claims import ShardRecord
from longtake.train.encode_plan import Cut, EncodePlan, latent_meta

_LOOKED_AT = 16  # samples of each bucket whose captions and json are measured
_TAR_END = 6144  # bytes: the end mark, and half of the block of 10,240 that a tar is filled up to
_EVERY = 60.0  # seconds between lines where there is no terminal for a bar


@dataclass(frozen=True)
class Forecast:
    """Sizes of an encode, in bytes; `whole` is all of the shards, tar headers and json included."""

    clips: int
    samples: int
    shards: int
    latents: int
    text: int
    whole: int

    def __str__(self) -> str:
        return (
            f"{self.samples} samples of {self.clips} clips in {self.shards} shards, about "
            f"{decimal(self.whole)}: latents {decimal(self.latents)}, text {decimal(self.text)}"
        )


def forecast(plan: EncodePlan, manifest: LatentManifest, text: TextConfig) -> Forecast:
    """What the shards will hold: shapes are known, captions measured on a few samples a bucket."""
    by_bucket: defaultdict[int, list[Cut]] = defaultdict(list)
    for cut in plan.cuts:
        by_bucket[cut.sample.bucket].append(cut)
    measure = _Measure(plan, manifest, text)
    totals = torch.zeros(3, dtype=torch.float64)  # latents, text, whole
    for cuts in by_bucket.values():
        sizes = [measure(cut) for cut in cuts[:: -(-len(cuts) // _LOOKED_AT)]]
        known = [size for size in sizes if size is not None]
        if known:
            totals += torch.tensor(known, dtype=torch.float64).mean(0) * len(cuts)
    latents, captions, whole = (round(total) for total in totals.tolist())
    whole += _TAR_END * len(plan.shards)
    clips = len({cut.sample.sample_id for cut in plan.cuts})
    return Forecast(clips, len(plan.cuts), len(plan.shards), latents, captions, whole)


class _Measure:
    """Bytes of one cut's latents, of its text, and of all its members in a tar."""

    def __init__(self, plan: EncodePlan, manifest: LatentManifest, text: TextConfig) -> None:
        self.plan, self.manifest = plan, manifest
        self.samples = SampleReader([plan.table], plan.config)
        self.tokenizer, self.width = Tokenizer(text), embed_dim(text)

    def __call__(self, cut: Cut) -> tuple[int, int, int] | None:
        """None for a sample that cannot be read: the encode will leave it out."""
        try:
            meta = latent_meta(self.samples, cut)
        except BadSample:
            return None
        kinds = [kind for kind in self.plan.config.val[0].captions if kind in meta["captions"]]
        rows = self.tokenizer([meta["captions"][kind] for kind in kinds])
        if self.manifest.text.kind == "embeddings":
            rows = [torch.zeros(len(row), self.width, dtype=torch.bfloat16) for row in rows]
        else:
            rows = [row.to(torch.int32) for row in rows]
        channels, *shape = self.manifest.latent_shape(cut.sample.shape)
        frames, stride = cut.sample.shape[0], self.manifest.strides[0]
        latents = torch.zeros(channels, *shape)
        places = {s.name: s.places(frames, stride) for s in self.plan.segments_of(frames)}
        sample = LatentSample(
            latents,
            dict(zip(kinds, rows, strict=True)),
            latents if self.manifest.logvar else None,
            {n: Segment(torch.zeros(channels, len(p), *shape[1:]), p) for n, p in places.items()},
        )
        members = latent_members(self.manifest, sample, meta)
        num_frames = shape[0] * (1 + self.manifest.logvar) + sum(map(len, places.values()))
        return (
            2 * latents[:, 0].numel() * num_frames,  # bf16
            sum(row.numel() * row.element_size() for row in rows),
            sum(512 + -(-len(data) // 512) * 512 for data in members.values()),
        )


class EncodeProgress:
    """How far all processes are, as one of them sees it; only the first shows a bar."""

    def __init__(self, total: int, rank: int, num_ranks: int) -> None:
        """`total` samples, shared out as they go among `num_ranks` processes of equal speed."""
        self.total, self.rank, self.num_ranks = total, rank, num_ranks
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        text = TextColumn("encode"), TextColumn("{task.description}")
        columns = (text[0], BarColumn(), MofNCompleteColumn(), text[1])
        is_hidden = rank > 0 or not self.console.is_terminal
        self._bar = Progress(*columns, console=self.console, disable=is_hidden)
        self._task = self._bar.add_task("", total=total)
        self._start = self._said = time.monotonic()
        self._own = self._all = self._in_shard = self._bytes = 0
        self._has_told = False

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def advance(self, samples: int) -> None:
        """This process has seen to so many samples more."""
        self._own += samples
        self._in_shard += samples
        self._show()

    def update(self, records: Iterable[ShardRecord]) -> None:
        """What all processes have done, after each shard of this one."""
        counts = [(r.samples + len(r.skipped), r.bytes) for r in records]
        self._all, self._bytes = sum(c for c, _ in counts), sum(b for _, b in counts)
        self._in_shard = 0
        if self._own and not self._has_told:
            self._has_told = True
            self.say(f"rank {self.rank} of {self.num_ranks}: {self.pace()}")
        self._show()

    def pace(self) -> str:
        """Speed of this process, and the time it has still to work at its share of the rest."""
        if not self._own:
            return "no sample yet"
        speed = self._own / max(time.monotonic() - self._start, 1e-9)
        share = (self.total - self._all - self._in_shard) / self.num_ranks
        left = timedelta(seconds=round(share / speed))
        return f"{speed:.1f} samples/s, {left} left for {share:.0f} samples"

    def _show(self) -> None:
        done, now = self._all + self._in_shard, time.monotonic()
        text = f"{decimal(self._bytes)}, {self.pace()}"
        self._bar.update(self._task, completed=done, description=text)
        if self.rank == 0 and not self.console.is_terminal and now - self._said > _EVERY:
            self._said = now
            self.say(f"{done} of {self.total} samples, {text}")
