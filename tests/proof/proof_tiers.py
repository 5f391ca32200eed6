"""`make proof`, its third part: tiers T2, T2m and T2c over three seeds.

`python -m tests.proof.proof_tiers [--tiers T2,T2m,T2c] [--seeds 0,1,2] [--out runs/proof] [--docs
docs/proof]` from the repository root. What a tier and seed reached is added to `docs/proof/
tiers.json` when it is known, bars that were missed included; what stands there with all its bars
is not run again: delete what other code or settings have made. The exit code is 1 when a bar is
missed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.train.tiers import TIERS

Found = dict[str, dict[str, dict[str, float]]]  # tier → seed → what was reached


def prove(tiers: Sequence[str], seeds: Sequence[int], out: Path, docs: Path) -> Found:
    """Run what is not recorded yet, record it."""
    path = docs / "tiers.json"
    found: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for seed in seeds:
        for tier in tiers:
            bars = {*TIERS[tier].least, *TIERS[tier].most}
            if bars <= found.setdefault(tier, {}).get(str(seed), {}).keys():
                continue
            folder = out / f"{tier}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            found[tier][str(seed)] = TIERS[tier].learn(folder, seed)
            docs.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.replace(scratch, path)
    return found


def show(found: Found, console: Console) -> None:
    """A row for each tier and value, a column for each seed, and the bar."""
    seeds = sorted({seed for runs in found.values() for seed in runs})
    table = Table("tier", "value", "bar", *(f"seed {seed}" for seed in seeds))
    for tier, runs in ((name, found[name]) for name in TIERS if name in found):
        bars = {name: f"≥ {x}" for name, x in TIERS[tier].least.items()}
        bars |= {name: f"≤ {x}" for name, x in TIERS[tier].most.items()}
        for name in dict.fromkeys(name for reached in runs.values() for name in reached):
            values = [runs.get(seed, {}).get(name) for seed in seeds]
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
            table.add_row(tier, name, bars.get(name, ""), *cells)
    console.print(table)


def main() -> int:
    """Run and record; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="tests.proof.proof_tiers", description=__doc__)

    def listed(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--tiers", type=listed, default=list(TIERS))
    parser.add_argument("--seeds", type=listed, default=["0", "1", "2"])
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--docs", type=Path, default=Path("docs/proof"))
    args: Any = parser.parse_args()
    found = prove(args.tiers, [int(seed) for seed in args.seeds], args.out, args.docs)
    show(found, Console())
    missed = [
        f"{tier}, seed {seed}: {bar}"
        for tier in args.tiers
        for seed in args.seeds
        for bar in TIERS[tier].missed(found[tier][seed])
    ]
    print("\n".join(missed) or "all bars are met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
