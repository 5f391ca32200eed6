"""A pack survives kills, full disks and poisoned files, and its shards are always the same."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longtake.data import pack
from longtake.data.pack import PackReport, pack_folder
from longtake.data.pack import job as pack_job
from longtake.data.pack.job import Job
from longtake.data.pack.progress import PackProgress
from longtake.data.pack.recode import Recipe
from longtake.data.shards import ShardReader, ShardWriter, Span
from tests.data.toy import toy_frames, toy_video

SPLIT = Recipe((16, 16), max_duration=0.5, min_duration=0.2, pixel_format="yuv444p")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven clips of 9 frames, two of them equal, one damaged, one that nobody describes."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for index in range(7):
        (folder / f"{index}.mp4").write_bytes(toy_video(index if index != 4 else 1))
        lines.append(json.dumps({"file": f"{index}.mp4", "caption": f"a square, {index}"}))
    (folder / "5.mp4").write_bytes(toy_video(5)[:-400])
    (folder / "captions.jsonl").write_text("\n".join(lines[:6]))
    return folder


def run(folder: Path, out: Path, **options: Any) -> PackReport:
    options = {"recipe": SPLIT, "max_samples": 3, "dataset": "toy", "progress": False} | options
    return pack_folder(folder, out, **options)


def tree(out: Path) -> dict[str, bytes]:
    """Every file, but for the times at which the shards were written."""
    return {
        path.relative_to(out).as_posix(): re.sub(rb'"mtime_ns": \d+', b"", path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def metas(report: PackReport) -> dict[str, dict[str, Any]]:
    reader = ShardReader()
    return {
        row["key"]: json.loads(
            reader.read(report.out / row["shard"], Span(row["meta_offset"], row["meta_size"]))
        )
        for row in report.catalogue.table.to_pylist()
    }


@pytest.mark.parametrize("recipe", [SPLIT, Recipe()])
def test_the_shards_are_the_same_for_any_number_of_workers(
    folder: Path, tmp_path: Path, recipe: Recipe
) -> None:
    made = []
    for num_workers in (1, 2, 3):
        run(folder, tmp_path / f"{num_workers}", recipe=recipe, num_workers=num_workers)
        made.append(tree(tmp_path / f"{num_workers}"))
    assert made[0] == made[1] == made[2]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_left_out_is_told(folder: Path, tmp_path: Path) -> None:
    report = run(folder, tmp_path / "out")
    assert (report.num_files, report.packed, report.num_split) == (4, 8, 4)
    assert report.duplicates == [("4.mp4", "1.mp4")]
    assert [file for file, _ in report.skipped] == ["5.mp4", "6.mp4"]
    shown = report.summary(limit=1)
    for part in ("packed 8 clips of 4 files", "split 4", "4.mp4: same bytes as 1.mp4"):
        assert part in shown
    assert "truncated" in shown and "6.mp4" not in shown and "skipped.jsonl" in shown
    listed = [json.loads(line) for line in (report.out / "skipped.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in listed] == ["5.mp4", "6.mp4", "4.mp4"]
    found = metas(report)
    assert list(found) == [f"{i}_00{part}" for i in range(4) for part in range(2)]
    first, second = found["1_000"], found["1_001"]
    assert first["source_id"] == second["source_id"] == "1.mp4"
    assert first["source_xxh3"] == second["source_xxh3"] != found["2_000"]["source_xxh3"]
    assert [(m["start"], m["stop"]) for m in (first, second)] == [(0, 0.5), (0.5, 1.0)]
    assert report.too_short == 4  # the ninth frame of each


def test_copies_are_kept_on_request(folder: Path, tmp_path: Path) -> None:
    report = run(folder, tmp_path / "out", dedup=False, recipe=Recipe())
    assert report.packed == 5 and report.duplicates == []


def _in_child(work: Callable[[], Any]) -> int:
    """Exit status of a forked process that runs `work`; negative: the signal that killed it."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(event: int) -> None:
    """SIGKILL this process at the n-th thing that it writes down, before or after writing it."""
    ourselves, count = os.getpid(), 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if os.getpid() != ourselves:  # a worker
                return function(*args, **kwargs)
            for step in range(2):
                count += 1
                if count == event:
                    os.kill(ourselves, signal.SIGKILL)
                if not step:
                    result = function(*args, **kwargs)
            return result

        return call

    Job._append = watched(Job._append)
    ShardWriter.write = watched(ShardWriter.write)
    os.replace = watched(os.replace)
    shutil.rmtree = watched(shutil.rmtree)


@pytest.mark.parametrize("recipe", [SPLIT, Recipe()])
def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path, recipe: Recipe) -> None:
    run(folder, tmp_path / "whole", recipe=recipe)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for event in range(1, 60):

        def attempt(event: int = event) -> None:
            _kill_at(event)
            run(folder, out, recipe=recipe, num_workers=1 + event % 3)

        code = _in_child(attempt)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert partial.exists() or tree(out)
        if event % 4 == 0:  # the journal's last line is cut
            with contextlib.suppress(FileNotFoundError), open(partial / "journal.jsonl", "ab") as f:
                f.write(b'{"source": 3, "cli')
    assert code == 0 and event > 5
    assert tree(out) == tree(tmp_path / "whole")
    assert not partial.exists()


def test_killed_between_appearing_and_cleaning_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Job, "forget", lambda self: None)
        first = run(folder, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    again = run(folder, tmp_path / "out")
    assert (again.packed, again.skipped) == (first.packed, first.skipped)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match="exists and is not empty"):
        run(folder, tmp_path / "out")


def test_what_was_recoded_is_not_recoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Job, "publish", lost)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out")
    monkeypatch.setattr(pack, "make_clips", lost)
    assert run(folder, tmp_path / "out").packed == 8


@pytest.mark.parametrize("where", ["shard", "spool"])
def test_a_full_disk_keeps_what_is_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run(folder, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A shard of three clips is larger than the files of its clips.
    shard = min(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    limit = shard - 1024 if where == "shard" else 1500
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; what is done is kept"):
            run(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial" / "shards").glob("*.tmp"))
    run(folder, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_poison_is_skipped_with_its_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = {(folder / f"{index}.mp4").read_bytes(): index for index in range(3)}
    make_clips = pack.make_clips

    def poisoned(data: bytes, *args: Any) -> Iterator[Any]:
        index = poison.get(data)
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1:
            time.sleep(1000)
        if index == 2:
            raise MemoryError
        yield from make_clips(data, *args)

    monkeypatch.setattr(pack, "make_clips", poisoned)
    report = run(folder, tmp_path / "out", recipe=Recipe(), timeout=2.0)
    reasons = dict(report.skipped)
    assert report.packed == 1
    assert "died: signal 9" in reasons["0.mp4"] and "memory" in reasons["2.mp4"]
    assert "no progress within 2 s" in reasons["1.mp4"]
    assert report.duplicates == [("4.mp4", "1.mp4")]


def test_one_pack_at_a_time_and_one_set_of_arguments(folder: Path, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Job, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out")
    asked = json.loads((tmp_path / "out.partial" / "job.json").read_text())
    job = Job(tmp_path / "out", asked)

    def refused() -> None:
        with pytest.raises(ValueError, match="another `longtake pack` is at work"):
            run(folder, tmp_path / "out")

    assert _in_child(refused) == 0
    job.close()
    with pytest.raises(ValueError, match=r"max_samples=4 \(was 3\); repeat those, or remove"):
        run(folder, tmp_path / "out", max_samples=4)
    shutil.rmtree(tmp_path / "out.partial" / "shards")
    with pytest.raises(ValueError, match="holds 0 of 3 finished shards"):
        run(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.partial")
    assert run(folder, tmp_path / "out").packed == 8


def test_a_file_that_changes_meanwhile_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = pack_job.Job.record

    def changing(self: Job, index: int, outcome: Any) -> None:
        record(self, index, outcome)
        (folder / f"{index}.mp4").write_bytes(toy_video(9))

    monkeypatch.setattr(Job, "record", changing)
    with pytest.raises(ValueError, match="changed while it was being packed; remove"):
        run(folder, tmp_path / "out", recipe=Recipe())


def test_sidecars_stand_in_for_captions(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(["a", "sub/b", "c", "d", "e"]):
        (folder / f"{name}.mp4").write_bytes(toy_video(index))
    (folder / "a.txt").write_text("a square\n")
    (folder / "sub" / "b.json").write_text('{"caption": "another", "licence": "CC0", "file": "x"}')
    (folder / "c.json").write_text('{"source_id": "film"}')
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbfthird")
    (folder / "d.txt").write_bytes(b"\xff")
    report = run(folder, tmp_path / "out", recipe=Recipe())
    found = metas(report)
    assert {key: meta["captions"]["dense"] for key, meta in found.items()} == {
        "a": "a square",
        "sub/b": "another",
        "c": "third",
    }
    assert found["c"]["source_id"] == "film" and found["sub/b"]["licence"] == "CC0"
    assert dict(report.skipped) == {
        "d.mp4": "caption is not UTF-8",
        "e.mp4": "neither clip.json nor clip.txt beside it",
    }


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_forecast_is_told_after_a_minute(tmp_path: Path, is_terminal: bool) -> None:
    now, shown = 0.0, StringIO()
    console = Console(file=shown, force_terminal=is_terminal, width=120)
    sizes = [1_000_000] * 100
    progress = PackProgress(sizes, tmp_path / "o", show=True, console=console, clock=lambda: now)
    with progress:
        for index in range(40):
            now += 2.0
            progress.done(index, 100_000, is_fresh=index >= 10)
            if now < 60:
                assert progress.forecast() is None
    # 30 files in 80 s, 60 to go, of 100 kB each
    assert progress.forecast() == "about 10.0 MB in the end, 0:02:40 left"
    text = shown.getvalue()
    assert "about 10.0 MB in the end" in text
    if not is_terminal:
        assert len(text.splitlines()) == 1 and text.startswith("pack: about 10.0 MB")


def test_images_and_videos_go_together(tmp_path: Path) -> None:
    from longtake.data.decode import encode_image

    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in {"a.mp4": toy_video(0), "b.png": encode_image(toy_frames(1)[0])}.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a square")
    report = run(folder, tmp_path / "out", recipe=Recipe((16, 16)))
    rows = report.catalogue.table.to_pylist()
    assert [(row["ext"], row["height"], row["width"]) for row in rows] == [
        ("mp4", 16, 16),
        ("png", 16, 16),
    ]
