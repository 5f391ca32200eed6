"""Windows per CPU-second from bytes: PyAV against decord, and prepared shards against footage.

`python -m tests.bench.bench_decode` from the repository root. A window is 16 frames, every second
one, at 128 px, from a random place. Both sides take turns in this process on one thread; figures
are CPU time, medians over rounds. Footage is generated once and kept in the temporary folder.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import decord
import numpy as np
from PIL import Image

from longtake.data.decode import decode_clip, encode_video, iter_frames, probe
from longtake.data.decode.guard import DecodeGuard

FRAMES, STRIDE, SIDE = 16, 2, 128
CACHE = Path(tempfile.gettempdir()) / "longtake-bench-decode-v1"
BUNNY = Path(__file__).resolve().parents[3] / "shared" / "videos" / "bigbuckbunny.mp4"
FOOTAGE = {
    "720p GOP 250": (720, 1280, 250),
    "720p GOP 30": (720, 1280, 30),
    "256 px GOP 30": (256, 456, 30),
}


def footage(height: int, width: int, count: int) -> Iterator[np.ndarray]:
    """A camera that wanders over texture, four things that move, and film noise."""
    rng = np.random.default_rng(0)

    def texture(height: int, width: int, cell: int) -> np.ndarray:
        cells = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(picture).astype(np.int16)

    tall, wide = height * 5 // 4, width * 5 // 4
    ground = sum(texture(tall, wide, cell) * share for cell, share in ((64, 3), (16, 2), (6, 1)))
    ground = np.asarray(ground) // 6
    things = [texture(height // 4, width // 5, 8) for _ in range(4)]
    noise = np.round(rng.normal(0, 2.5, (5, height + 16, width + 16, 1))).astype(np.int16)

    def place(phase: float, room: int) -> int:
        return int((1 + np.sin(phase)) / 2 * room)

    for index in range(count):
        turn = 2 * np.pi * index / 900
        y, x = place(turn, tall - height), place(1.7 * turn + 1.6, wide - width)
        picture = ground[y : y + height, x : x + width].copy()
        for number, thing in enumerate(things):
            phase = turn * (1.3 + 0.4 * number) + number
            y, x = place(phase, height - len(thing)), place(1.2 * phase, width - thing.shape[1])
            picture[y : y + len(thing), x : x + thing.shape[1]] = thing
        y, x = rng.integers(0, 16, 2)
        picture += noise[index % 5][y : y + height, x : x + width]
        yield picture.clip(0, 255).astype(np.uint8)


def generated(name: str, count: int = 500) -> bytes:
    """H.264 as most files are: yuv420p, crf 23, B-frames, 30 fps."""
    path = CACHE / f"{name.replace(' ', '-')}-{count}.mp4"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        height, width, gop = FOOTAGE[name]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
            for picture in footage(height, width, count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        path.write_bytes(buffer.getvalue())
    return path.read_bytes()


def recoded(name: str, data: bytes, side: int) -> bytes:
    """As `pack --recode <side> --gop 30` stores it."""
    path = CACHE / f"{name.replace(' ', '-')}-recoded-{side}.mp4"
    if path.exists():
        return path.read_bytes()
    info = probe(data)
    size = side, round(side * info.width / info.height / 2) * 2
    frames = iter_frames(data, 0, info.duration, fps=info.fps, size=size, resize="antialias")
    path.write_bytes(encode_video(frames, info.fps, gop=30, crf=23, pixel_format="yuv420p"))
    return path.read_bytes()


def read_pyav(data: bytes, indices: list[int], fps: float, size: tuple[int, int]) -> np.ndarray:
    """The window as the loader reads it."""
    return decode_clip(data, [(index + 0.25) / fps for index in indices], size=size)


def read_decord(data: bytes, indices: list[int], fps: float, size: tuple[int, int]) -> np.ndarray:
    """The window as decord's users read it: a reader per sample, scaled, one thread."""
    height, width = size
    reader = decord.VideoReader(
        io.BytesIO(data), ctx=decord.cpu(0), width=width, height=height, num_threads=1
    )
    return reader.get_batch(indices).asnumpy()


def seconds(read: Callable[[], object]) -> float:
    """CPU time of the process."""
    start = time.process_time()
    read()
    return time.process_time() - start


class Case:
    """One file, its size on the way out, and its random windows."""

    def __init__(self, data: bytes) -> None:
        info = probe(data)
        self.data, self.fps, self.frames = data, info.fps, info.frames
        self.size = SIDE, round(SIDE * info.width / info.height)

    def windows(self, count: int, seed: int) -> list[list[int]]:
        """Indices of the frames of `count` windows."""
        last = self.frames - FRAMES * STRIDE
        starts = np.random.default_rng(seed).integers(0, last + 1, count)
        return [list(range(start, start + FRAMES * STRIDE, STRIDE)) for start in starts.tolist()]

    def reference(self, indices: list[int]) -> np.ndarray:
        """Full decode, RGB at full size, then Lanczos with antialiasing."""
        times = [(index + 0.25) / self.fps for index in indices]
        height, width = self.size
        pictures = decode_clip(self.data, times)
        return np.stack(
            [
                np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.LANCZOS))
                for p in np.ascontiguousarray(pictures)
            ]
        )


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """dB of 8-bit pictures."""
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - two) ** 2), 1e-9)))


def compare(case: Case, rounds: int, windows: int) -> tuple[float, float]:
    """CPU seconds per window of PyAV and decord, the median round of each."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        sums = [0.0, 0.0]
        for indices in case.windows(windows, seed=turn):
            for side, read in enumerate((read_pyav, read_decord)):
                sums[side] += seconds(
                    lambda r=read, i=indices: r(case.data, i, case.fps, case.size)
                )
        if turn:  # the first one warms up
            spent[0].append(sums[0] / windows)
            spent[1].append(sums[1] / windows)
    return statistics.median(spent[0]), statistics.median(spent[1])


def bench_guard() -> None:
    """Wall time that the child adds to a small clip."""
    clip = np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), dtype=np.uint8)
    data, times = encode_video(clip, 8), [index / 8 for index in range(17)]
    guard = DecodeGuard(60, 2**30)
    spent: dict[str, list[float]] = {"inside": [], "child": []}
    for _ in range(300):
        for name, read in (("inside", decode_clip), ("child", guard.decode_clip)):
            start = time.perf_counter()
            read(data, times)
            spent[name].append(time.perf_counter() - start)
    guard.close()
    inside, child = (1e6 * statistics.median(values) for values in spent.values())
    print(f"guard: {child:.0f} us against {inside:.0f} us inside: {child - inside:+.0f} us a call")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=6)
    options = parser.parse_args()
    cases = {name: Case(generated(name)) for name in FOOTAGE}
    if BUNNY.exists():
        cases["bigbuckbunny"] = Case(BUNNY.read_bytes())
    prepared = [("720p GOP 250", 256), ("720p GOP 250", 128), ("bigbuckbunny", 128)]
    prepared = [(name, side) for name, side in prepared if name in cases]
    for name, side in prepared:
        cases[f"{name} as {side} px"] = Case(recoded(name, cases[name].data, side))
    print(f"{'16 frames, stride 2, 128 px':<28}{'pyav':>9}{'decord':>9}  ratio   dB pyav / decord")
    costs = {}
    for name, case in cases.items():
        costs[name], other = compare(case, options.rounds, options.windows)
        [indices] = case.windows(1, seed=99)
        exact = case.reference(indices)
        quality = [
            psnr(read(case.data, indices, case.fps, case.size), exact)
            for read in (read_pyav, read_decord)
        ]
        print(
            f"{name:<28}{1e3 * costs[name]:>6.1f} ms{1e3 * other:>6.1f} ms"
            f"{other / costs[name]:>6.2f}x{quality[0]:>9.1f} / {quality[1]:.1f}",
            flush=True,
        )
    for name, side in prepared:
        gain = costs[name] / costs[f"{name} as {side} px"]
        print(f"{name} recoded to {side} px and GOP 30 is {gain:.1f}x cheaper")
    bench_guard()


if __name__ == "__main__":
    main()
