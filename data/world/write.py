"""Shards of the world: resumable by shard, the same bytes for any number of workers."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longtake.data.catalogue import build_catalogue, load_catalogue
from longtake.data.decode import decode_clip, encode_image, encode_video
from longtake.data.process_map import map_processes
from longtake.data.randomness import derive_seed, numpy_rng, uniform
from longtake.data.shards import ShardWriter
from longtake.data.world.clips import (
    DEFAULT_SHAPES,
    Shapes,
    WorldClip,
    check_request,
    describe,
    draw_clip,
)
from longtake.data.world.defects import plant

CRF = 10
MIN_PSNR = 40.0  # dB; yuv444p at crf 10 gives 47 and more
CHECK_EVERY = 16  # clips; those are decoded again to measure it
SETTINGS = "world.json"
VERSION = 2  # of what the clips look like; part of the settings


@dataclass(frozen=True, slots=True)
class WorldRequest:
    """All that determines the bytes of the shards of one split."""

    families: tuple[str, ...]
    num_clips: int
    split: str
    sizes: tuple[tuple[int, int], ...]
    frames: tuple[int, ...]
    fps: tuple[float, ...]
    defects: float
    seed: int
    shard_size: int
    version: int = VERSION

    def clip(self, index: int) -> WorldClip:
        """Clip `index` as it is written: clean, or with a defect planted."""
        clip = self._clean_clip(index)
        if not self._is_defective(index):
            return clip
        first = index - index % self.shard_size
        earlier = (i for i in range(index - 1, first - 1, -1) if not self._is_defective(i))
        original = next(earlier, None)
        rng = numpy_rng(derive_seed(self.seed, self.split, index), "defect")
        return plant(clip, rng, None if original is None else self._clean_clip(original))

    def _clean_clip(self, index: int) -> WorldClip:
        shapes = Shapes(self.sizes, self.frames, self.fps)
        return draw_clip(describe(self.seed, self.split, index, self.families, shapes))

    def _is_defective(self, index: int) -> bool:
        return uniform(derive_seed(self.seed, self.split, index), "is defective") < self.defects


@dataclass(frozen=True, slots=True)
class WorldReport:
    """What `write_world` did: clips and shards in the folder, how many of them are new, seconds."""

    num_clips: int
    num_shards: int
    new_shards: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.num_clips} clips in {self.num_shards} shards, {self.new_shards} of them new, "
            f"{self.seconds:.1f} s"
        )


def write_world(
    out: Path | str,
    *,
    families: Sequence[str],
    num_clips: int,
    split: str = "train",
    shapes: Shapes = DEFAULT_SHAPES,
    defects: float = 0.0,
    seed: int = 0,
    num_workers: int = 2,
    progress: bool = True,
    shard_size: int = 250,
) -> WorldReport:
    """Write clips 0 … num_clips - 1 of a split as <out>/<split>-*.tar and index the folder.

    Each clip gets one of the `shapes` that its family allows; a share of `defects` of them carries
    a planted defect (defects.py). Shards that are there already are kept, so a stopped run goes on
    where it was. Several splits may share a folder: call once for each.

    Raises:
        ValueError: what `check_request` refuses, or a folder begun with other settings.
        OSError: the disk is full, or a worker was killed; finished shards stay.
    """
    out = Path(out)
    check_request(families, split, shapes)
    if num_clips < 1 or shard_size < 1:
        raise ValueError(f"num_clips={num_clips} and shard_size={shard_size} must be at least 1")
    if not 0 <= defects <= 1:
        raise ValueError(f"defects={defects} must be a share in [0, 1]")
    request = WorldRequest(
        families=tuple(families),
        num_clips=num_clips,
        split=split,
        sizes=shapes.sizes,
        frames=shapes.frames,
        fps=shapes.fps,
        defects=defects,
        seed=seed,
        shard_size=shard_size,
    )
    started = time.monotonic()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    _remember(out / SETTINGS, request)
    num_shards = -(-num_clips // shard_size)
    missing = [i for i in range(num_shards) if not (out / _shard_name(split, i)).exists()]
    with _bar(progress) as bar:
        kept = num_clips - sum(len(_clips_of(request, i)) for i in missing)
        task = bar.add_task(f"world {split}", total=num_clips, completed=kept)
        for done in map_processes(partial(_write_shard, out, request), missing, num_workers):
            bar.advance(task, done)
    if missing or not _is_indexed(out):
        build_catalogue(out, num_workers=num_workers, progress=progress)
    return WorldReport(num_clips, num_shards, len(missing), time.monotonic() - started)


def _is_indexed(out: Path) -> bool:
    """False after a call that was killed between its last shard and the catalogue."""
    try:
        load_catalogue(out)
    except ValueError:
        return False
    return True


def _bar(progress: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), disable=not progress)


def _shard_name(split: str, index: int) -> str:
    return f"{split}-{index:06d}.tar"


def _clips_of(request: WorldRequest, shard: int) -> range:
    first = shard * request.shard_size
    return range(first, min(first + request.shard_size, request.num_clips))


def _remember(path: Path, request: WorldRequest) -> None:
    """Note the settings of a split beside its shards; refuse to go on with other ones."""
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it, and the shards if their settings are unknown"
        ) from error
    wanted = json.loads(json.dumps(asdict(request)))
    old = known.get(request.split)
    if old is not None and old != wanted:
        differing = sorted(k for k in wanted if old.get(k) != wanted[k])
        changes = ", ".join(f"{k}={wanted[k]!r} (was {old.get(k)!r})" for k in differing)
        raise ValueError(
            f"{path.parent}: its {request.split} shards were made with other settings: {changes}; "
            "choose another folder or delete this one"
        )
    known[request.split] = wanted
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
    os.replace(temporary, path)


def _write_shard(out: Path, request: WorldRequest, shard: int) -> int:
    """Draw, encode and write one tar; the number of its clips."""
    clips = _clips_of(request, shard)
    writer = ShardWriter(
        out,
        max_samples=request.shard_size,
        max_bytes=2**62,
        prefix=request.split,
        start=shard,
    )
    with writer:
        for index in clips:
            clip = request.clip(index)
            # Grain, which is a defect, costs the codec more than it is allowed.
            is_checked = index % CHECK_EVERY == 0 and not clip.truth["defects"]
            writer.write(clip.key, sample_members(clip, check=is_checked))
    return len(clips)


def sample_members(clip: WorldClip, *, check: bool = False) -> dict[str, bytes]:
    """The files of a clip in its shard: json and mp4, or png for a single frame.

    With `check` the mp4 is decoded and must reach MIN_PSNR; RuntimeError if it does not.
    """
    record = json.dumps(clip.record(), ensure_ascii=False, separators=(",", ":")).encode()
    if len(clip.frames) == 1:
        return {"png": encode_image(clip.frames[0]), "json": record}
    video = encode_video(clip.frames, clip.fps, crf=CRF)
    if check:
        times = [t / clip.fps for t in range(len(clip.frames))]
        error = decode_clip(video, times).astype(np.float32) - clip.frames
        psnr = 10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-9))
        if psnr < MIN_PSNR:
            raise RuntimeError(f"{clip.key}: {psnr:.1f} dB after H.264, {MIN_PSNR} wanted")
    return {"mp4": video, "json": record}
