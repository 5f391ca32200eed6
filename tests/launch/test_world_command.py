"""`longtake world` writes shards, shows families, checks scores and asks for videos."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longtake.data.catalogue import load_catalogue
from longtake.data.world import FAMILIES, make_clip, read_caption
from longtake.data.world.validity import Validity
from longtake.launch import cli, world_command

ROW = Validity("move", "pace", 256, 1.0, {"at_rest": 0.0}, 0.5, 0.5, 0.5, {"noise": 1.0})
TINY = ("--families", "move,leftright", "--size", "16x16")


def test_shards_of_several_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "world"
    argv = ["world", str(out), "--clips", "40", "--families", "move,leftright", "--workers", "1"]
    argv += ["--size", "16x16,16x24", "--frames", "1,5", "--fps", "4,8", "--defects", "0.25"]
    assert cli.main(argv) == 0
    assert "40 clips in 1 shards" in capsys.readouterr().out
    rows = load_catalogue(out).table.to_pylist()
    assert {(row["height"], row["width"]) for row in rows} == {(16, 16), (16, 24)}
    assert {row["frames"] for row in rows} == {1, 5}
    assert 0 < sum(dict(row["scores"])["defect"] for row in rows) < 20
    assert {row["split"] for row in rows} == {"train"}
    assert cli.main([*argv, "--seed", "1"]) == 1
    assert "seed=1 (was 0)" in capsys.readouterr().err


def test_defaults_are_one_shape_of_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    monkeypatch.setattr("longtake.data.world.write_world", lambda *a, **k: seen.update(k) or "")
    assert cli.main(["world", str(tmp_path)]) == 0
    shapes = seen.pop("shapes")
    assert (shapes.sizes, shapes.frames, shapes.fps) == (((32, 32),), (17,), (8,))
    assert seen == {
        "families": tuple(FAMILIES),
        "num_clips": 1000,
        "split": "train",
        "defects": 0.0,
        "seed": 0,
        "num_workers": 2,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one of OUT"),
        ("OUT --check", "give one of OUT"),
        ("--check --defects 0.1", "--defects is for shards only"),
        ("--check --kind short", "--kind needs --prompts"),
        ("OUT --kind short", "--kind needs --prompts"),
        ("--show OUT/a.png --frames 1,5", "one shape"),
        ("OUT --frames 1 --families move,candle", "will do for candle .*families move"),
        ("OUT --families moove", "'moove' is unknown"),
        ("--check --frames 5,1 --families candle", "candle"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    argv = ["world", *(word.replace("OUT", str(tmp_path / "out")) for word in words.split())]
    assert cli.main(argv) == 1
    pytest.RaisesExc(ValueError, match=message).matches(ValueError(capsys.readouterr().err))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--defects=2", "--defects=x", "--size=8x", "--frames=1,,0"])
def test_words_that_are_no_numbers_are_usage_errors(word: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["world", "out", word])
    assert caught.value.code == 2


def test_show_draws_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["world", "--families", "move", "--show"]) == 0
    assert (tmp_path / "world.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_stand_for_clips_that_can_be_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "prompts.jsonl"
    argv = ["world", "--prompts", str(path), "--clips", "6", "--families", "move,leftright"]
    argv += ["--size", "16x16,16x24", "--frames", "1,5", "--seed", "3", "--kind", "short"]
    assert cli.main(argv) == 0
    assert "12 prompts" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["family"] for row in rows] == ["move", "leftright"] * 6
    assert len({row["key"] for row in rows}) == 12
    for row in rows:
        clip = make_clip(
            row["seed"],
            row["split"],
            int(row["key"].rpartition("-")[2]),
            families=[row["family"]],
            frames=row["frames"],
            height=row["height"],
            width=row["width"],
            fps=row["fps"],
        )
        assert (clip.key, clip.form) == (row["key"], row["form"])
        assert row["split"] == "val" and row["kind"] == "short"
        assert row["prompt"] == clip.captions["short"]
        assert row["expect"] == read_caption(row["prompt"]).expect
    assert {row["frames"] for row in rows} == {1, 5} and {row["fps"] for row in rows} == {8}


@pytest.mark.parametrize("kind", ["dense", "short", "zh"])
def test_prompts_of_other_kinds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "prompts.jsonl"
    argv = ["world", "--prompts", str(path), "--clips", "1", "--kind", kind, "--split", "combo"]
    assert cli.main([*argv, *TINY]) == 0
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in rows] == [kind] * 2 and rows[0]["split"] == "combo"
    assert rows[0]["expect"]


def test_check_prints_a_table_and_fails_where_the_rule_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "79")
    asked = []

    def measured(family: str, **shape: object) -> list[Validity]:
        asked.append((family, shape["frames"], shape["height"], shape["width"], shape["num_clips"]))
        row = replace(ROW, family=family)
        return [row, replace(row, score="shape", truth=0.9)] if family == "above" else [row]

    monkeypatch.setattr("longtake.data.world.validity.measure", measured)
    argv = ["world", "--check", "--size", "16x16,32x48", "--clips", "16", "--workers", "1"]
    assert cli.main([*argv, "--families", "move"]) == 0
    assert asked == [("move", 17, 16, 16, 16), ("move", 17, 32, 48, 16)]
    shown = capsys.readouterr().out
    assert "val, 17 frames of 16x16" in shown and "val, 17 frames of 32x48" in shown
    assert "0.00 at rest" in shown and max(map(len, shown.splitlines())) <= 79
    assert cli.main([*argv, "--families", "move,above"]) == 1
    shown = capsys.readouterr().out
    assert "above.shape: truth 0.900" in shown


def test_check_measures(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["world", "--check", "--clips", "4", "--families", "move", "--size", "16"]
    assert cli.main(argv) == 1 and "fewer than 16" in capsys.readouterr().err
    argv[3] = "16"
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert all(score in shown for score in ("colour", "shape", "size", "direction", "pace"))


def test_long_names_survive_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    row = replace(
        ROW,
        family="occlusion",
        score="count_constancy",
        faults={"recoloured_midway_and_more": 0.04},
        unmoved={"effect early": 0.98},
    )
    Console(width=79).print(world_command.validity_table("title", [row]))
    shown = capsys.readouterr().out
    assert "count_constancy" in shown and "1.00" in shown and "0.98" in shown
    assert max(map(len, shown.splitlines())) <= 79 and "…" not in shown
