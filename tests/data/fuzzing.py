"""Mutated tars and clips, run in a process of their own: `python -m tests.data.fuzzing tar 0 1000`.

Prints how the inputs ended as JSON. Any other error than those that name a bad input ends it with a
traceback; so do claims of more memory than `MEMORY`.
"""

import io
import json
import random
import resource
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from longtake.data.catalogue.indexing import index_shard
from longtake.data.decode import encode_image, encode_video
from longtake.data.shards import ShardError
from tests.data.toy import toy_frames

MEMORY = 2**30  # bytes above what the imports take
BLOCK = 512
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def make_tar(form: int) -> bytes:
    """Two good samples, a folder, a long name and a member that belongs to nothing."""
    video = encode_video(toy_frames(0, 2, 16, 16), 8)
    members = {
        "a.mp4": video,
        "a.json": b'{"caption": "a cat", "truth": {"n": 1}}',
        "d/" + "n" * 120 + ".video.mp4": video,
        "d/" + "n" * 120 + ".short.txt": b"a dog",
        "README": b"x" * 600,
    }
    return tar_of(members, form).rstrip(b"\0") + bytes(BLOCK * 3)


def tar_of(members: Mapping[str, bytes | bytearray], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar with a folder and these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_clips() -> list[bytes]:
    """A small clip in every container that is read."""
    frames = toy_frames(0, 5)
    clips = [encode_video(frames, 8), encode_image(frames[0])]
    for form, codec in (
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mov", "mpeg4"),
        ("image2", "mjpeg"),
        ("image2", "libwebp"),
    ):
        clips.append(_encode(frames, form, codec))
    return clips


def _encode(frames: np.ndarray, form: str, codec: str) -> bytes:
    if form == "image2":
        context = av.CodecContext.create(codec, "w")
        context.width, context.height = 32, 32  # type: ignore[attr-defined]
        context.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"  # type: ignore[attr-defined]
        context.time_base = Fraction(1, 8)
        frame = VideoFrame.from_ndarray(frames[0], format="rgb24").reformat(format="yuv420p")
        frame.pts = 0
        packets = [*context.encode(frame), *context.encode(None)]  # type: ignore[attr-defined]
        return b"".join(bytes(packet) for packet in packets)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"  # type: ignore[attr-defined]
        for array in frames:
            frame = VideoFrame.from_ndarray(array, format="rgb24")
            container.mux(stream.encode(frame))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytearray:
    """One to five of: bytes flipped, a claim replaced, a piece cut, moved, doubled or zeroed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if not out:
            break
        at = rng.randrange(len(out))
        length = rng.choice((1, 2, 4, 8, 16, BLOCK, rng.randrange(1, len(out) + 1)))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % 2 ** (8 * size)
            out[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = out[rng.randrange(len(out)) :][:length]
        elif kind == 5:
            out[at : at + length] = bytes(min(length, len(out) - at))
        else:
            del out[at:]
    return out


def mutate_tar(data: bytes, rng: random.Random) -> bytearray:
    """As `mutate`, or a header altered field by field with its checksum made right again."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    out = bytearray(data)
    headers = [at for at in range(0, len(out), BLOCK) if out[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(headers, rng.randint(1, 3)):
        field = rng.randrange(6)
        if field == 0:  # size: octal, or base 256 with its sign
            number = rng.choice((*NUMBERS, BLOCK, 2**33, len(out)))
            octal = b"%011o\0" % (number % 8**11)
            binary = rng.choice((b"\x80", b"\xff")) + number.to_bytes(11, "big")
            out[at + 124 : at + 136] = rng.choice((octal, binary, rng.randbytes(12)))
        elif field == 1:
            out[at + 156] = rng.choice((*b"0123456789LKxgSVD\0", rng.randrange(256)))
        elif field == 2:
            name = rng.choice((b"../x.mp4", b"/x.mp4", b"a.mp4", b"." * 99, rng.randbytes(90), b""))
            out[at : at + 100] = name.ljust(100, b"\0")
        elif field == 3:
            out[at + 345 : at + 500] = rng.randbytes(155)
        elif field == 4:  # what follows may be a pax record
            record = rng.choice(
                (
                    b"9 size=1\n",
                    b"30 size=99999999999999999999\n",
                    b"999999999999 path=x\n",
                    b"%d path=../y.mp4\n" % 18,
                    b"17 GNU.sparse.x=1\n",
                    rng.randbytes(40),
                    b"9" * 500,
                )
            )
            out[at + BLOCK : at + BLOCK + len(record)] = record
        else:
            out[at + rng.randrange(BLOCK)] = rng.randrange(256)
        out[at + 148 : at + 156] = b"%06o\0 " % (
            sum(out[at : at + 148]) + sum(out[at + 156 : at + BLOCK]) + 256
        )
    return out


def run(kind: str, first: int, count: int) -> dict[str, float | int]:
    """How `count` inputs ended, the slowest one in seconds."""
    ends: Counter[str] = Counter()
    slowest = 0.0
    tars = [make_tar(form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    sources = tars if kind == "tar" else make_clips()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        for number in range(first, first + count):
            rng = random.Random(f"{kind}{number}")
            source = sources[number % len(sources)]
            data = mutate_tar(source, rng) if kind == "tar" else mutate(source, rng)
            path.write_bytes(data if kind == "tar" else tar_of({"x.mp4": data, "x.txt": b"a cat"}))
            started = time.monotonic()
            try:
                index = index_shard(path, "d")
                for row in index.rows:
                    assert 0 <= row["payload_offset"] <= path.stat().st_size - row["payload_size"]
                ends["rejected" if index.rejected else "read"] += 1
            except ShardError:
                ends["refused"] += 1
            slowest = max(slowest, time.monotonic() - started)
    return {**ends, "slowest_ms": round(1000 * slowest)}


if __name__ == "__main__":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
