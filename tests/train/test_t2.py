"""Tiers T2, T2m and T2c: learning on the whole road, from shards to scores.

`python -m pytest -m slow -s tests/train/test_t2.py` prints the cards; `make proof-tiers` runs them
with three seeds.
"""

from pathlib import Path

import pytest

from tests.train.tiers import TIERS


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("name", TIERS)
def test_the_nano_model_learns(name: str, tmp_path: Path) -> None:
    reached = TIERS[name].learn(tmp_path, 0)
    missed = TIERS[name].missed(reached)
    assert not missed, f"{missed} of {reached}"
