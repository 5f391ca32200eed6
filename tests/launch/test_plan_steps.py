"""`longtake plan-steps` lets anybody audit what a run sees, with or without a config."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longtake.data.catalogue import build_catalogue, load_catalogue
from longtake.data.decode import encode_image
from longtake.launch import cli
from tests.data.toy import toy_dataset, toy_frames, toy_meta, toy_video, write_shards

SLOTS = 8
NANO = ("experiment=nano_identity", "data.micro_batches_per_step=2")
BUCKET = "data.buckets=[{frames: 5, height: 16, width: 16, batch_size: 2}]"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 clips of three aspect ratios, and images: some of 9 frames, some of 12."""
    folder = tmp_path_factory.mktemp("data") / "mixed"
    sizes = [(32, 32), (32, 64), (64, 32)]
    videos = {
        (shape, frames): toy_video(i, frames, *shape)
        for i, shape in enumerate(sizes)
        for frames in (9, 12)
    }
    image = encode_image(toy_frames(0, 1, 48, 48)[0])
    samples: list[tuple[str, dict[str, bytes]]] = []
    for i in range(300):
        payload = {"png": image} if i % 10 == 9 else {"mp4": videos[sizes[i % 3], 9 + i % 2 * 3]}
        samples.append((f"clip{i:04d}", {**payload, "json": toy_meta(i)}))
    write_shards(folder, samples, 50)
    build_catalogue(folder, num_workers=1, progress=False)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.main(["plan-steps", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_defaults_need_no_config_and_see_every_clip(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(capsys, mixed, "--steps", "0:30")
    assert len(lines) == 30 * SLOTS and {line["step"] for line in lines} == set(range(30))
    for line in lines:
        assert set(line) == {"step", "slot", "rank", "shapes", "cost", "samples"}
        assert line["shapes"] == [sample["shape"] for sample in line["samples"]]
        for sample in line["samples"]:
            assert len(sample["times"]) == sample["shape"][0] and len(sample["crop"]) == 2
    costs = {step: {x["cost"] for x in lines if x["step"] == step} for step in range(30)}
    assert all(len(each) == 1 for each in costs.values()), "slots of a step cost the same"
    samples = [sample for line in lines for sample in line["samples"]]
    first = Counter(sample["key"] for sample in samples if sample["visit"] == 0)
    assert set(first.values()) == {1} and len(first) >= 0.9 * 300
    shapes = {tuple(sample["shape"]) for sample in samples}
    assert any(w > h for _, h, w in shapes) and any(h > w for _, h, w in shapes)
    assert {t for t, _, _ in shapes} == {1, 9}


def test_ranks_of_every_world_size_see_the_same_steps(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(capsys, mixed, "--steps", "3:6")
    for world in (2, 4, 8):
        parts = [
            run(capsys, mixed, "--steps", "3:6", "--world-size", str(world), "--rank", str(rank))
            for rank in range(world)
        ]
        assert {line["rank"] for part in parts for line in part} == set(range(world))
        union = sorted(
            (line for part in parts for line in part), key=lambda x: (x["step"], x["slot"])
        )
        assert [{**line, "rank": 0} for line in union] == whole
    assert cli.main(["plan-steps", str(mixed), "--world-size", "3"]) == 1
    assert "data.micro_batches_per_step=8 must be a multiple of the 3" in capsys.readouterr().err
    assert cli.main(["plan-steps", str(mixed), "--world-size", "2", "--rank", "2"]) == 1


def test_bytes_of_all_nodes_add_up_to_the_dataset(
    mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_catalogue(mixed).table.to_pylist()
    size = {row["key"]: row["payload_size"] + row["meta_size"] for row in rows}
    words = (mixed, "--steps", "0:20", "--bytes", "--world-size", "8", "--ranks-per-node", "2")
    lines = run(capsys, *words)
    nodes = [line for line in lines if "node" in line]
    batches = [line for line in lines if "node" not in line]
    assert [line["node"] for line in nodes] == [0, 1, 2, 3]
    for line in batches:
        assert line["bytes"] == sum(size[sample["key"]] for sample in line["samples"])
    assert sum(node["bytes"] for node in nodes) == sum(line["bytes"] for line in batches)


def test_overrides_and_composed_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_dataset(tmp_path / "toy")
    words = ("data.micro_batches_per_step=2", BUCKET, "data.window=start", "--steps", "3:5")
    lines = run(capsys, tmp_path / "toy", *words)
    assert [(x["step"], x["slot"], x["shapes"]) for x in lines] == [
        (step, slot, [[5, 16, 16]] * 2) for step in (3, 4) for slot in (0, 1)
    ]
    assert run(capsys, tmp_path / "toy", *words, "seed=1") != lines
    data = [f"data.{name}.0.path={tmp_path / 'toy'}" for name in ("train", "val")]
    composed = run(capsys, *NANO, *data, BUCKET, "--steps", "3:5")
    assert len(composed) == 4
    for words, message in (
        ((tmp_path / "toy", "data.bukets=3"), "data.bukets: unknown key"),
        ((tmp_path / "toy", "train.steps=3"), "only data.* can be changed here"),
        ((tmp_path / "toy", tmp_path), "give one folder"),
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "toy", "--steps", "5:5"), None),
    ):
        try:
            code = cli.main(["plan-steps", *map(str, words)])
        except SystemExit as error:
            code = error.code
        assert code != 0
        assert message is None or message in capsys.readouterr().err


def test_a_run_is_audited_with_its_exclusions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_dataset(tmp_path / "toy")
    data = [f"data.{name}.0.path={tmp_path / 'toy'}" for name in ("train", "val")]
    words = ("train", *NANO, *data, BUCKET, "--dry-run")
    assert cli.main([*words]) == 0
    folder = tmp_path / "run"
    folder.mkdir()
    out, err = capsys.readouterr()
    (folder / "config.yaml").write_text(out)
    assert "step 2, rank 0, slot 0: " in err and "dit: " in err and "text: " in err
    before = run(capsys, folder, "--steps", "0:4")
    victim = before[2]["samples"][1]["sample_id"]
    row = json.dumps({"sample_id": victim, "from_step": 1, "reason": "damaged"})
    (folder / "quarantine.jsonl").write_text(f'{row}\n{{"sample_id": 1, "from')
    after = run(capsys, folder, "--steps", "0:4")
    changed = [
        (old["sample_id"], new["replaces"])
        for one, two in zip(before, after, strict=True)
        for old, new in zip(one["samples"], two["samples"], strict=True)
        if old != new
    ]
    assert changed and all(pair == (victim, victim) for pair in changed)
    checkpoint = folder / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "train_state.json").write_text('{"plan": "another"}')
    assert cli.main(["plan-steps", str(folder)]) == 1
    assert "is not what it was trained on up to step 4" in capsys.readouterr().err
