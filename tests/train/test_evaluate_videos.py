"""Scoring videos of any program: captions from anywhere, every kind of bad input counted."""

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longtake.data.decode import encode_image, encode_video
from longtake.data.world import WorldClip, make_clip
from longtake.train.card import read_rows
from longtake.train.evaluate_videos import evaluate_videos

FAMILIES = ("move", "leftright")


def clips(number: int = 6) -> list[WorldClip]:
    shape = {"frames": 9, "height": 32, "width": 32}
    return [make_clip(0, "val", i, families=[FAMILIES[i % 2]], **shape) for i in range(number)]


def write_video(path: Path, clip: WorldClip, pixel_format: str = "yuv444p") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_video(clip.frames, clip.fps, pixel_format=pixel_format))


def write_prompts(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")


def prompt_row(clip: WorldClip, kind: str = "short", **changes: object) -> dict:
    row = {"key": f"{clip.family}-{clip.key}", "family": clip.family, "split": clip.split}
    row |= {"prompt": clip.captions[kind], "frames": 9, "height": 32, "width": 32, "fps": clip.fps}
    return {**row, "seed": 0, **changes}


def test_true_clips_score_one_whatever_their_captions_are(tmp_path: Path) -> None:
    rows = []
    for clip, kind in zip(clips(), ("short", "dense", "zh", "short", "dense", "zh"), strict=True):
        write_video(tmp_path / "v" / f"{clip.family}-{clip.key}.mp4", clip)
        rows.append(prompt_row(clip, kind))
    write_prompts(tmp_path / "v", rows)
    result = evaluate_videos(tmp_path / "v")
    assert result.folder == tmp_path / "v-scores" and not result.card.left_out
    assert all(score.score == 1 for score in result.card.scores)
    assert {score.split for score in result.card.scores} == {"val"} and result.card.mean == 1
    written = read_rows(result.folder / "clips.parquet")
    assert len(written) == 6 and all(row.chance.keys() == row.drawn.keys() for row in written)
    again = evaluate_videos(tmp_path / "v", tmp_path / "again")
    assert again.card == result.card


def test_captions_may_stand_beside_the_files(tmp_path: Path) -> None:
    one, two, three = clips(3)
    write_video(tmp_path / "a.mp4", one)
    (tmp_path / "a.txt").write_text(one.captions["dense"].upper() + "\n")
    write_video(tmp_path / "sub" / "b.mp4", two)
    (tmp_path / "sub" / "b.json").write_text(json.dumps({"prompt": two.captions["short"]}))
    write_video(tmp_path / "c.mp4", three)
    (tmp_path / "c.txt").write_text(one.captions["dense"])  # shows something else
    card = evaluate_videos(tmp_path, tmp_path.with_name("out")).card
    drawn = {row.key: row.drawn for row in read_rows(tmp_path.with_name("out") / "clips.parquet")}
    assert set(drawn["a"].values()) == set(drawn["b"].values()) == {1.0}
    assert min(drawn["c"].values()) == 0 and not card.left_out


def test_the_pixel_format_has_its_own_ceiling(tmp_path: Path) -> None:
    made = [make_clip(0, "val", i, families=["move"], height=16, width=16) for i in range(4)]
    for name in ("yuv444p", "yuv420p"):
        for clip in made:
            write_video(tmp_path / name / f"{clip.key}.mp4", clip, name)
            (tmp_path / name / f"{clip.key}.txt").write_text(clip.captions["short"])
    full, halved = (evaluate_videos(tmp_path / n).card for n in ("yuv444p", "yuv420p"))
    ceilings = [{s.name: s.ceiling or 0 for s in card.scores} for card in (full, halved)]
    assert min(ceilings[0].values()) >= 0.9
    assert sum(ceilings[1].values()) < sum(ceilings[0].values())


def test_given_frames_are_compared_with_the_clip_made_again(tmp_path: Path) -> None:
    made = clips(4)
    for clip in made:
        other = clip.frames if clip.family == "move" else np.roll(clip.frames, 9, axis=2)
        path = tmp_path / f"{clip.family}-{clip.key}.mp4"
        path.write_bytes(encode_video(other, clip.fps))
    write_prompts(
        tmp_path,
        [
            prompt_row(clip, prompt=clip.captions["short"].upper(), task="i2v", given=[0])
            for clip in made
        ],
    )
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    kept = {s.family: s.score for s in result.card.scores if s.name == "given_kept"}
    assert kept == {"move": 1.0, "leftright": 0.0}
    assert {score.task for score in result.card.scores} == {"i2v"}


def test_bad_input_is_counted_and_named(tmp_path: Path) -> None:
    good, size, length, rate, strange, vague, given, lost = clips(8)
    wanted = prompt_row
    rows = [
        wanted(good, key="good"),
        wanted(size, key="size", height=64),
        wanted(length, key="length", frames=17),
        wanted(rate, key="rate", fps=24),
        wanted(strange, key="strange", prompt="a cat plays the piano"),
        wanted(vague, key="vague", prompt=vague.captions["vague"]),
        wanted(given, key="given-00000099", given=[0]),
        wanted(lost, key="lost"),
    ]
    write_prompts(tmp_path, rows)
    for row, clip in zip(
        rows[:-1], (good, size, length, rate, strange, vague, given), strict=False
    ):
        write_video(tmp_path / f"{row['key']}.mp4", clip)
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.txt").write_text(good.captions["short"])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "empty.txt").write_text(good.captions["short"])
    (tmp_path / "mute.mp4").write_bytes(whole)
    (tmp_path / "torn.mp4").write_bytes(whole)
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "tiny.png").write_bytes(encode_image(good.frames[0, :8, :8]))
    (tmp_path / "tiny.txt").write_text(good.captions["short"])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    assert {score.num_clips for score in result.card.scores} == {1}
    lines = (result.folder / "left_out.jsonl").read_text().splitlines()
    reasons = {row["file"]: row["reason"] for row in map(json.loads, lines)}
    assert reasons == {
        "size.mp4": "size other than asked",
        "length.mp4": "length other than asked",
        "rate.mp4": "rate other than asked",
        "strange.mp4": "caption outside the world's grammar",
        "vague.mp4": "caption that asks for nothing",
        "given-00000099.mp4": "given frames of another clip than seed and key say",
        "lost": "no video for this prompt",
        "cut.mp4": "file that cannot be decoded",
        "empty.mp4": "file that cannot be decoded",
        "mute.mp4": "no caption: neither in prompts.jsonl nor beside it as .json or .txt",
        "torn.mp4": "no prompt in the .json or .txt beside it",
        "tiny.png": "shorter or smaller than its caption needs",
    }
    assert result.card.left_out["file that cannot be decoded"] == 2
    assert sum(result.card.left_out.values()) == len(reasons)


def test_one_prompt_has_one_video(tmp_path: Path) -> None:
    one, two = clips(2)
    write_video(tmp_path / "a" / "x.mp4", one)
    write_video(tmp_path / "b" / "x.mp4", two)
    write_prompts(tmp_path, [prompt_row(one, key="x")])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    assert result.card.left_out == {"a second file for one prompt": 1}
    write_prompts(tmp_path, [prompt_row(one, file="a/x.mp4"), prompt_row(two, file="b/x.mp4")])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    assert not result.card.left_out and result.card.mean == 1
    write_prompts(tmp_path, [prompt_row(one, key="x"), prompt_row(two, key="x")])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    twice = {"not a row with key and prompt": 1, "a second file for one prompt": 1}
    assert result.card.left_out == twice
    lines = (result.folder / "left_out.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["file"] == "prompts.jsonl:2"
    assert "x was already asked for" in lines[0]


def test_one_bad_file_never_ends_the_others(tmp_path: Path) -> None:
    good = clips(1)[0]
    write_video(tmp_path / "good.mp4", good)
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbf" + good.captions["short"].encode())
    whole = (tmp_path / "good.mp4").read_bytes()
    sidecars = {
        "latin": b"un cercle \xe9",
        "rate": json.dumps({"prompt": good.captions["short"], "fps": "8"}).encode(),
        "given": json.dumps({"prompt": good.captions["short"], "given": [0]}).encode(),
        "list": b"[1, 2]",
    }
    for name, content in sidecars.items():
        (tmp_path / f"{name}.mp4").write_bytes(whole)
        (tmp_path / f"{name}.{'txt' if name == 'latin' else 'json'}").write_bytes(content)
    still = make_clip(0, "val", 0, families=["move"], frames=17)
    (tmp_path / "still.png").write_bytes(encode_image(still.frames[0]))
    (tmp_path / "still.txt").write_text("a green circle moves up behind a bar")
    (tmp_path / "rest.png").write_bytes(encode_image(still.frames[0]))
    (tmp_path / "rest.txt").write_text(still.captions["short"])  # of motion
    (tmp_path / "old.gif").write_bytes(b"GIF89a")
    (tmp_path / "old.txt").write_text(still.captions["short"])
    (tmp_path / "notes.md").write_text("no video, and no caption beside it")
    row = {"prompt": good.captions["short"], "given": [0], "seed": 0, "split": "val"}
    (tmp_path / "number-²-².mp4").write_bytes(whole)
    (tmp_path / "number-²-².json").write_text(json.dumps(row))
    frames = [*good.frames, *good.frames]
    (tmp_path / "uneven.mp4").write_bytes(uneven_video(frames))
    (tmp_path / "uneven.txt").write_text(good.captions["short"])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    lines = (result.folder / "left_out.jsonl").read_text().splitlines()
    assert {row["file"]: row["reason"] for row in map(json.loads, lines)} == {
        "latin.mp4": "no prompt in the .json or .txt beside it",
        "rate.mp4": "no prompt in the .json or .txt beside it",
        "list.mp4": "no prompt in the .json or .txt beside it",
        "given.mp4": "given frames without seed, split and key of their true clip",
        "still.png": "shorter or smaller than its caption needs",
        "rest.png": "shorter or smaller than its caption needs",
        "old.gif": "a file of a kind that is not read: .gif",
        "number-²-².mp4": "given frames without seed, split and key of their true clip",
        "uneven.mp4": "variable frame rate",
    }
    assert {score.num_clips for score in result.card.scores} == {1}
    with pytest.raises(ValueError, match="would replace the folder of the videos"):
        evaluate_videos(tmp_path, tmp_path)


def test_shapes_the_world_cannot_draw_are_scored_without_a_ceiling(tmp_path: Path) -> None:
    clip = clips(1)[0]
    wide = np.pad(clip.frames, ((0, 0), (0, 0), (0, 96), (0, 0)), mode="edge")
    (tmp_path / "wide.mp4").write_bytes(encode_video(wide, clip.fps))
    (tmp_path / "wide.txt").write_text(clip.captions["short"])
    row = prompt_row(clip, key="wide-00000000", width=128, given=[0])
    (tmp_path / "wide-00000000.mp4").write_bytes(encode_video(wide, clip.fps))
    (tmp_path / "wide-00000000.json").write_text(json.dumps(row))
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    assert [row.ceiling for row in read_rows(result.folder / "clips.parquet")] == [{}]
    reason = "given frames of a clip that the world cannot draw"
    assert result.card.left_out == {reason: 1}
    assert {score.score for score in result.card.scores} == {1.0}
    write_video(tmp_path / "square.mp4", clip)
    (tmp_path / "square.txt").write_text(clip.captions["short"])
    result = evaluate_videos(tmp_path, tmp_path.with_name("o"))
    assert {score.ceiling for score in result.card.scores} == {1.0}  # of the one that has it


def uneven_video(frames: list[np.ndarray]) -> bytes:
    """An mp4 whose second half runs at a quarter of the rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "10"}
        time_base = Fraction(1, 32)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            late = max(index - len(frames) // 2, 0)
            frame.pts, frame.time_base = 4 * index + 12 * late, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_what_can_not_be_scored_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_videos(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no video"):
        evaluate_videos(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"junk")
    (tmp_path / "a.txt").write_text("a red circle moves left")
    with pytest.raises(ValueError, match=r"no video could be scored \(1 x file that cannot"):
        evaluate_videos(tmp_path)
    assert [path.name for path in tmp_path.parent.glob("*-scores")] == []
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: 'key'"):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
        evaluate_videos(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        evaluate_videos(tmp_path, prompts=tmp_path / "other.jsonl")
