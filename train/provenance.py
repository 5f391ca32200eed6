"""What a run was made of: code, config, packages, data and machine, written down at each start."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from longtake.data.plan import Plan
from longtake.train.ranks import Ranks
from longtake.train.run_folder import write_json
from longtake.train.tracking import redact

FOLDER = "provenance"
MAX_DIFF = 1_000_000  # characters of the changes that are not committed
# What changes how a process computes or talks; the rest of an environment is nobody's business.
SPOKEN = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH", "PYTORCH_", "LONGTAKE_", "SLURM_JOB_ID")


def write_provenance(
    folder: Path, attempt: int, config: Mapping[str, Any], plan: Plan, ranks: Ranks
) -> None:
    """Write provenance/attempt-0001.json of a run folder: without secrets, see `redact`."""
    facts = {
        "time": time.time(),
        "command": sys.argv,
        "code": code_facts(),
        "packages": package_versions(),
        "host": host_facts(ranks),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SPOKEN)},
        "data": {
            "plan": plan.fingerprint,
            "catalogues": {str(table.root): table.info.fingerprint for table in plan.tables},
        },
        "config": config,
    }
    path = folder / FOLDER / f"attempt-{attempt:04d}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, redact(facts))


@functools.cache
def code_facts() -> dict[str, Any]:
    """Version of the package; of a checkout also the commit and what differs from it."""
    root = Path(__file__).resolve().parents[1]
    facts: dict[str, Any] = {"folder": str(root), "version": _version()}
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()) != root:  # installed, perhaps inside somebody's checkout
        return facts
    diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-textconv") or ""
    return facts | {
        "commit": (_git(root, "rev-parse", "HEAD") or "").strip(),
        "diff": diff if len(diff) <= MAX_DIFF else f"{diff[:MAX_DIFF]}\n... cut",
        "untracked": (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines(),
    }


def _version() -> str | None:
    try:
        return metadata.version("longtake")
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str | None:
    """What git prints; None where there is no git, or it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Of every installed package, from the names of their folders (PEP 427): reading the metadata
    of each would take longer than the first steps of a small run."""
    found = {}
    for folder in sys.path:
        for info in sorted(Path(folder or ".").glob("*.dist-info")):
            name, _, version = info.stem.rpartition("-")
            found.setdefault(name, version)
    return dict(sorted(found.items()))


def host_facts(ranks: Ranks) -> dict[str, Any]:
    """Of the machine of rank 0, and how many ranks there are."""
    gpus = range(torch.cuda.device_count()) if ranks.device.type == "cuda" else ()
    return {
        "name": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "cuda": torch.version.cuda,
        "ranks": ranks.world_size,
    }
