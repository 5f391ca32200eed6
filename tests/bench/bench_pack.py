"""What `longtake pack --recode` costs and what it saves: `python -m tests.bench.bench_pack`.

Windows of 16 frames, every other one, resized to 128 pixels, at random places: CPU time from the
source's bytes against the recoded ones, side by side. Bars: 30x on generated 720p footage of
keyframe distance 250 against --recode 256 --gop 30, 8x on bigbuckbunny.mp4 against --recode 128.
"""

import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from longtake.data.decode import decode_clip, probe
from longtake.data.pack import pack_folder
from longtake.data.pack.recode import Recipe
from longtake.data.shards import ShardReader, Span

REAL = Path(__file__).resolve().parents[3] / "shared" / "videos" / "bigbuckbunny.mp4"
NUM_WINDOWS = 20


def footage(path: Path, frames: int = 400, height: int = 720, width: int = 1280) -> None:
    """720p, 30 fps, a keyframe every 250 frames: texture that pans under sprites, with noise."""
    rng = np.random.default_rng(0)

    def texture(height: int, width: int, cell: int) -> np.ndarray:
        small = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(small, format="rgb24")
        return frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()

    layers = [texture(900, 1600, cell) for cell in (64, 16, 6)]
    ground = np.mean(layers, axis=0).astype(np.int16)
    sprites = [texture(180, 256, 8) for _ in range(3)]
    grain = np.round(rng.normal(0, 2.5, (4, height, width, 1))).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"g": "250", "keyint_min": "250", "sc_threshold": "0", "crf": "23"}
        for index in range(frames):
            angle = 2 * np.pi * index / 240
            y, x = ((1 + np.sin([angle, 1.7 * angle])) / 2 * [180, 320]).astype(int)
            frame = ground[y : y + height, x : x + width].copy()
            for number, sprite in enumerate(sprites):
                turn = angle * (1.3 + 0.4 * number) + number
                y, x = ((1 + np.sin([turn, 1.2 * turn + 1])) / 2 * [540, 1024]).astype(int)
                frame[y : y + 180, x : x + 256] = sprite
            frame = np.clip(frame + grain[index % 4], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def pack_one(path: Path, out: Path, recipe: Recipe) -> tuple[bytes, float]:
    """The one clip that a folder with this file packs to, and the seconds that it took."""
    path.with_suffix(".txt").write_text("a clip")
    started = time.perf_counter()
    report = pack_folder(path.parent, out, recipe=recipe, num_workers=1, progress=False)
    seconds = time.perf_counter() - started
    [row] = report.catalogue.table.to_pylist()
    span = Span(row["payload_offset"], row["payload_size"])
    return ShardReader().read(out / row["shard"], span), seconds


def windows(clips: list[bytes]) -> Iterator[list[float]]:
    """CPU milliseconds for each clip, in turns, window by window."""
    info = probe(clips[0])
    size = (128, round(128 * info.width / info.height))
    rng = np.random.default_rng(1)
    for _ in range(NUM_WINDOWS):
        first = int(rng.integers(0, info.frames - 31))
        times = [(first + 2 * k + 0.25) / info.fps for k in range(16)]
        spent = []
        for clip in clips:
            started = time.process_time()
            decode_clip(clip, times, size=size)
            spent.append(1000 * (time.process_time() - started))
        yield spent


def compare(name: str, path: Path, out: Path, recipe: Recipe, bar: float) -> None:
    """Print one line: cost before and after, their ratio, and what packing took."""
    source = path.read_bytes()
    packed, seconds = pack_one(path, out, recipe)
    before, after = np.mean(list(windows([source, packed])), axis=0)
    info, made = probe(source), probe(packed)
    print(
        f"{name}: {before:.1f} -> {after:.2f} CPU-ms a window, {before / after:.1f}x (bar {bar}x); "
        f"{info.width}x{info.height} -> {made.width}x{made.height}, "
        f"{len(packed) / len(source):.2f} of the bytes; packed {info.frames / seconds:.0f} "
        f"frames/s on one worker, {info.duration / seconds:.1f}x real time"
    )


def main() -> None:
    """Both comparisons."""
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "generated" / "clip.mp4"
        generated.parent.mkdir()
        footage(generated)
        recipe = Recipe((256, 256), gop=30, keep_audio=False)
        compare("720p GOP 250, --recode 256", generated, Path(folder) / "a", recipe, 30)
        recipe = Recipe((128, 128), gop=30, keep_audio=False)
        compare("720p GOP 250, --recode 128", generated, Path(folder) / "c", recipe, 30)
        if not REAL.exists():
            print(f"{REAL} is not there: left out")
            return
        real = Path(folder) / "real" / "clip.mp4"
        real.parent.mkdir()
        real.write_bytes(REAL.read_bytes())
        compare("bigbuckbunny.mp4, --recode 128", real, Path(folder) / "b", recipe, 8)


if __name__ == "__main__":
    main()
