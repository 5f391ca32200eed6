"""What a tier and seed reached is recorded when it is known, and not run again."""

import json
import sys
from pathlib import Path

import pytest

from tests.proof import proof_tiers
from tests.train.tiers import Tier


def test_every_seed_is_run_once_and_bars_that_are_missed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Path, int]] = []

    def learn(folder: Path, seed: int) -> dict[str, float]:
        calls.append((folder, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"direction": 0.9 - 0.1 * seed, "loss": 1.0}

    monkeypatch.setattr(proof_tiers, "TIERS", {"T": Tier(learn, {"direction": 0.85}, {"loss": 1})})
    command = ["proof_tiers", "--tiers", "T", f"--out={tmp_path}/runs", f"--docs={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        proof_tiers.main()
    assert list(json.loads((tmp_path / "tiers.json").read_text())["T"]) == ["0", "1"]
    assert proof_tiers.main() == 1
    assert [seed for _, seed in calls] == [0, 1, 2, 2]
    assert len({folder for folder, _ in calls}) == 3 and calls[0][0].is_dir()
    told = capsys.readouterr().out
    assert "T, seed 1: direction 0.800 < 0.85" in told and "seed 0:" not in told
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "0"])
    assert proof_tiers.main() == 0
