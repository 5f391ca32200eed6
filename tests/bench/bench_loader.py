"""What the road from shards to batches costs: `python -m tests.bench.bench_loader [overhead|road]`.

overhead: from tar to checked bytes and parsed captions, without decoding, per sample of 235 kB, in
one process with a warm page cache. Ours reads in the plan's shuffled order and checks both hashes;
WebDataset reads in the order of the tar and checks nothing; the bare pread knows all offsets.
Bar: 60 µs a sample, aim 40.

road: random windows of 16 frames, every other one, from 256-pixel clips (keyframe distance 30) at
128 pixels, as batches of 4, at equal numbers of workers.
"""

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["WDS_SECURE"] = "1"

import decord
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset
from webdataset.shardlists import split_by_node

from longtake.data.catalogue import build_catalogue
from longtake.data.config import BucketConfig, DataConfig, DatasetConfig
from longtake.data.decode import encode_video
from longtake.data.loader import Loader
from longtake.data.plan import Plan
from longtake.data.reader import SampleReader
from tests.data.toy import toy_meta, toy_video, write_shards

NUM_SAMPLES, SAMPLE_BYTES, ROUNDS = 1024, 235_000, 7
NUM_CLIPS, FRAMES, SIZE, BATCH, WINDOWS, ROAD_ROUNDS = 48, 120, 128, 4, 96, 3


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["overhead", "road"]
    with tempfile.TemporaryDirectory() as folder:
        if "overhead" in wanted:
            overhead(Path(folder) / "overhead")
        if "road" in wanted:
            road(Path(folder) / "road")


def overhead(folder: Path) -> None:
    """The table of µs a sample: the best of ROUNDS passes, taken in turn."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(NUM_SAMPLES):
        video = toy_video(index % 4)
        free = SAMPLE_BYTES - len(video)  # a box that decoders pass over, of random bytes
        video += free.to_bytes(4, "big") + b"free" + rng.bytes(free - 8)
        samples.append((f"clip{index:06d}", {"mp4": video, "json": toy_meta(index)}))
    write_shards(folder, samples, 128)
    build_catalogue(folder, progress=False)
    config = DataConfig(
        train=[DatasetConfig(str(folder))],
        buckets=[BucketConfig(9, 32, 32, 8)],
        micro_batches_per_step=2,
        decode_timeout=None,
    )
    plan = Plan.from_config(config, 0)
    order = [s for k in range(NUM_SAMPLES // 16) for m in plan.step(k) for s in m.samples]
    reader = SampleReader(plan.tables, plan.config)
    table = plan.tables[0]
    names = ("payload_offset", "payload_size", "meta_offset", "meta_size")
    files = {name: os.open(folder / name, os.O_RDONLY) for name, _ in table.info.shards}
    places = [
        (files[table.shard(s.row)[0]], *(int(table.rows[s.row][name]) for name in names))
        for s in order
    ]
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]

    def ours() -> Iterator[Any]:
        return map(reader.meta, order)

    def wds() -> Iterator[Any]:
        for sample in WebDataset(tars, shardshuffle=False):
            yield json.loads(sample["json"]), sample["mp4"]

    def bare() -> Iterator[Any]:
        for fd, start, size, meta_start, meta_size in places:
            yield os.pread(fd, size, start), os.pread(fd, meta_size, meta_start)

    kinds = {"Longtake": ours, "WebDataset": wds, "bare pread": bare}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, read in kinds.items():
            times[name].append(timed(read()))
    print(f"\noverhead without decode, {NUM_SAMPLES} samples of {SAMPLE_BYTES} bytes")
    print("| | CPU µs a sample | wall µs | CPU against bare pread |\n|---|---|---|---|")
    best = {name: np.min(rounds, axis=0) for name, rounds in times.items()}
    for name, (cpu, wall) in best.items():
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {cpu / best['bare pread'][0]:.2f}x |")


def timed(samples: Iterable[Any]) -> tuple[float, float]:
    """µs a sample: CPU, wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    count = sum(1 for _ in samples)
    assert count == NUM_SAMPLES
    return (
        (time.process_time() - cpu) / count * 1e6,
        (time.perf_counter() - wall) / count * 1e6,
    )


def footage(index: int) -> np.ndarray:
    """Texture that pans behind noise, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(index)
    small = rng.integers(0, 256, (1, 3, 24, 24), dtype=np.uint8)
    ground = torch.nn.functional.interpolate(torch.from_numpy(small).float(), 384, mode="bicubic")
    ground = ground[0].permute(1, 2, 0).clamp(0, 255).numpy()
    frames = []
    for time_ in range(FRAMES):
        y, x = ((1 + np.sin([time_ / 30, time_ / 19 + index])) * 63).astype(int)
        frames.append(ground[y : y + 256, x : x + 256] + rng.normal(0, 2, (256, 256, 1)))
    return np.clip(frames, 0, 255).astype(np.uint8)


def decord_window(data: bytes | str, rng: np.random.Generator) -> torch.Tensor:
    """16 frames, every other one, at a random place: uint8 (3, T, H, W)."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    video = decord.VideoReader(source, width=SIZE, height=SIZE, num_threads=1)
    start = int(rng.integers(0, len(video) - 31))
    frames = video.get_batch(list(range(start, start + 32, 2))).asnumpy()
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()


class Files(Dataset[Any]):
    """The clips as files, as most training code has them."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(path) for path in sorted(folder.glob("*.mp4"))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return decord_window(self.paths[index], np.random.default_rng())


def road(folder: Path) -> None:
    """The table of windows a second, the best of ROAD_ROUNDS passes, taken in turn."""
    files = folder / "files"
    files.mkdir(parents=True)
    samples = []
    for index in range(NUM_CLIPS):
        video = encode_video(footage(index), 30, crf=23, pixel_format="yuv420p", gop=30)
        (files / f"{index:04d}.mp4").write_bytes(video)
        samples.append((f"clip{index:04d}", {"mp4": video, "json": toy_meta(index)}))
    write_shards(folder / "shards", samples, 12)
    build_catalogue(folder / "shards", progress=False)
    config = DataConfig(
        train=[DatasetConfig(str(folder / "shards"))],
        buckets=[BucketConfig(16, SIZE, SIZE, BATCH)],
        micro_batches_per_step=1,
        fps=15,
        decode_timeout=None,
    )
    guarded = replace(config, decode_timeout=60.0)
    tars = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]

    def ours(config: DataConfig, workers: int) -> Iterator[Any]:
        for batches in Loader(Plan.from_config(config, 0), range(1), num_workers=workers):
            yield torch.stack([clip.video for clip in batches[0].clips if clip.video is not None])

    def wds(workers: int) -> Iterator[Any]:
        pipeline = WebDataset(tars, shardshuffle=False, resampled=True, nodesplitter=split_by_node)
        windows = pipeline.shuffle(100).map(
            lambda sample: decord_window(sample["mp4"], np.random.default_rng())
        )
        return iter(DataLoader(windows, BATCH, num_workers=workers))  # type: ignore[arg-type]

    def torch_files(workers: int) -> Iterator[Any]:
        while True:
            yield from DataLoader(Files(files), BATCH, shuffle=True, num_workers=workers)

    kinds: dict[str, Callable[[int], Iterator[Any]]] = {
        "Longtake": lambda workers: ours(config, workers),
        "Longtake, clips decoded in a guarded child": lambda workers: ours(guarded, workers),
        "WebDataset + decord": wds,
        "torch DataLoader over files + decord": torch_files,
    }
    size = sum(len(members["mp4"]) for _, members in samples) // NUM_CLIPS
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(ROAD_ROUNDS):
        for name, make in kinds.items():
            for workers in (0, 2):
                rates.setdefault((name, workers), []).append(rate(make(workers)))
    print(f"\nwindows of 16 frames; clips of 256 px, {FRAMES} frames, {size} bytes")
    print("| | 0 workers, windows/s | CPU ms a window | 2 workers, windows/s |\n|---|---|---|---|")
    for name in kinds:
        alone, cpu = max(r for r, _ in rates[name, 0]), min(c for _, c in rates[name, 0])
        two = max(r for r, _ in rates[name, 2])
        shown = f"{cpu * 1e3:.1f}" if "child" not in name else "–"
        print(f"| {name} | {alone:.1f} | {shown} | {two:.1f} |")


def rate(batches: Iterator[Any]) -> tuple[float, float]:
    """Windows a second, once the first batches have come, and CPU seconds of this process each."""
    for batch in islice(batches, 2):
        assert batch.shape == (BATCH, 3, 16, SIZE, SIZE), batch.shape
    cpu, wall = time.process_time(), time.perf_counter()
    count = sum(len(batch) for batch in islice(batches, WINDOWS // BATCH))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    getattr(batches, "close", lambda: None)()
    return count / wall, cpu / count


if __name__ == "__main__":
    main()
