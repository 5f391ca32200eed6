"""The report stands alone, shows what was drawn, and its picture is small enough for a README."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from longtake.data.decode import probe
from longtake.train.card import read_rows
from longtake.train.evaluate import EvaluateOptions, evaluate_run
from longtake.train.playback import enlarge, read_footage_file, to_frames, to_pixels, viewing_mp4
from longtake.train.report import write_report
from longtake.train.report_curves import Series, read_series, smoothed, svg
from longtake.train.report_page import ClipCard, View, clip_grid, page
from longtake.train.report_picture import MAX_BYTES, PictureRow, chosen, write_picture
from longtake.train.sample import SampleRequest, sample_to_files

from .conftest import Road
from .small_runs import write_metrics


@pytest.fixture(scope="module")
def run(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "dit"
    shutil.copytree(road.dit, folder)
    options = EvaluateOptions(
        splits=("val",), tasks=("t2v",), num_prompts=2, num_pairs=1, num_shown=2
    )
    evaluate_run(folder, options)
    sample_to_files(folder, SampleRequest(["a <b>red</b> circle"]), device="cpu")
    return folder


def test_the_page_stands_alone(run: Path, road: Road) -> None:
    html_path, picture = write_report(run, vae_run=road.vae)
    html = html_path.read_text()
    assert html_path == run / "report.html" and picture == run / "report.png"
    links = re.findall(r'(?:src|href)="([^"]{0,24})', html)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http://www.w3.org[^"]*', "", html)
    assert html.count("<video") == 4 + 1  # four clips (drawn, VAE, truth in one), one sample
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in html
    assert "relation" in html and "pair_flip" in html and "raw · t2v · val" in html
    assert "card.mean" in html and "hidden_size" in html
    assert picture.stat().st_size < MAX_BYTES


def test_a_card_of_an_older_version_is_passed_over(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    shutil.copytree(run, folder)
    (folder / "evaluation" / "old").mkdir()
    (folder / "evaluation" / "old" / "card.json").write_text('{"schema": 1}')
    html = write_report(folder)[0].read_text()
    assert "schema 1" in html and "pair_flip" in html
    with pytest.raises(ValueError, match="schema 1"):
        write_report(folder, scores=[folder / "evaluation" / "old"])


def test_a_run_without_evaluation_has_a_page(road: Road, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(road.vae, folder)
    assert write_report(folder) == [folder / "report.html"]


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        write_report(tmp_path)


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "attempt": 1, "loss": 5.0},
        {"step": 2, "attempt": 1, "loss": 4.0},
        {"step": 2, "attempt": 2, "loss": 3.0},
    ]
    write_metrics(tmp_path, rows)
    assert read_series(tmp_path)["loss"] == Series("loss", (1, 2), (5.0, 3.0))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows"):
        read_series(tmp_path)


def test_curves() -> None:
    assert smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    element = svg(Series("val/loss", tuple(range(50)), tuple(1 / (1 + i) for i in range(50))))
    assert element.startswith("<svg ") and 'aria-label="val/loss"' in element
    ids = re.findall(r' id="([^"]+)"', element)
    assert all(name.startswith("val_loss_") for name in ids) and len(ids) == len(set(ids))


def test_videos_are_visible_and_play_everywhere() -> None:
    frames = np.zeros((3, 16, 20, 3), np.uint8)
    frames[1, :, :10] = (228, 38, 38)
    data = viewing_mp4(frames, 8)
    info = probe(data)
    assert (info.frames, info.height, info.width, info.codec) == (3, 256, 320, "h264")
    large = enlarge(frames, 3)
    assert large.shape == (3, 48, 60, 3)
    assert (large[1, :, :30] == (228, 38, 38)).all() and (large[1, :, 30:] == 0).all()
    with pytest.raises(ValueError, match="--upscale 0"):
        enlarge(frames, 0)


def test_pixels_and_frames_are_inverse() -> None:
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert (to_frames(to_pixels(frames)) == frames).all()


def test_text_cannot_break_out_of_the_page() -> None:
    html = page(
        "a<b", "x&y", [("", clip_grid([ClipCard("<script>", View(b"", "image/png"), ['"'])]))]
    )
    assert "<script>" not in html and "a&lt;b" in html


def test_the_picture_fits_whatever_it_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)  # the worst for PNG
    write_picture([PictureRow("noise " * 30, noise, noise)] * 6, tmp_path / "p.png")
    info = probe((tmp_path / "p.png").read_bytes())
    assert (tmp_path / "p.png").stat().st_size < MAX_BYTES and info.width > 300
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    assert (chosen(noise)[[0, -1]] == noise[[0, -1]]).all()
    with pytest.raises(ValueError, match="longtake evaluate"):
        write_picture([], tmp_path / "q.png")


def test_a_damaged_video_is_named(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    shutil.copytree(run, folder)
    world = folder / "evaluation/world"
    row = next(row for row in read_rows(world / "clips.parquet") if row.files)
    broken = world / row.files["drawn"]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"drawn\.mp4"):
        write_report(folder)
    with pytest.raises(ValueError, match="no such file"):
        read_footage_file(folder / "nothing.mp4")
