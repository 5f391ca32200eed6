"""The commands of the DiT's proof are ones that longtake knows; bars ask for whole intervals."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longtake.launch.cli import parse
from longtake.launch.compose import compose, compose_dit
from longtake.train.schema import DiTRun
from longtake.train.tasks import Drawing
from longtake.train.trainer import write_drawings
from tests.proof.pictures import draw_samples
from tests.proof.proof_dit import GIVEN, LEARNED, gates, phases
from tests.proof.proof_vae import run_of


def test_every_phase_is_a_command_that_runs_alone(tmp_path: Path) -> None:
    stages, texts = [], []
    for phase in phases(tmp_path):
        args = parse(list(phase.argv))
        if args.command.name == "encode":
            texts.append(compose_dit(["stage=dit", *args.overrides]).text)
        if args.command.name == "train":
            config = compose(args.overrides)
            assert Path(config.output_dir) == run_of(phase)
            stages.append(config.stage)
            if isinstance(config, DiTRun):
                texts.append(config.text)
    assert stages == ["vae", "vae", "vae", "dit"]
    assert len(texts) == 3 and texts == texts[:1] * 3  # captions are cached for the DiT's encoder


def test_an_interval_must_clear_the_blind_level() -> None:
    def score(task: str, family: str, name: str) -> dict[str, Any]:
        named = {"task": task, "family": family, "name": name}
        return named | {"low": 0.4, "blind": 0.25, "score": 0.8}

    scores = [score("t2v", *key) for key in LEARNED]
    scores += [score(task, family, "continuation") for task in GIVEN for family in ("a", "b")]
    assert all(gate.is_met for gate in gates({"scores": scores}, 89.0))
    scores[0]["low"], scores[-1]["score"] = 0.3, 0.6
    met = [gate.is_met for gate in gates({"scores": scores}, 91.0)]
    assert met == [False, False, True, True, True, True, True, False]


def test_a_picture_of_prompts_and_what_was_drawn(tmp_path: Path) -> None:
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    names = "drawn", "VAE", "truth"
    write_drawings(tmp_path, [Drawing(name, frames, 8.0, "") for name in names])
    kept = {name: f"{name}.mp4" for name in names}
    rows = [("a", "t2v", kept), ("b", "t2v", {}), ("c", "join", kept)]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(("prompt", "task", "files"))}
    types = [("prompt", pa.string()), ("task", pa.string())]
    schema = pa.schema([*types, ("files", pa.map_(pa.string(), pa.string()))])
    columns["files"] = [list(files.items()) for files in columns["files"]]
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "clips.parquet")
    draw_samples(tmp_path, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 0
