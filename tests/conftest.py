"""Shared settings: one torch thread, so that forked gloo ranks cannot deadlock, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
REAL_CLIPS = ROOT.parent / "shared" / "videos"


@pytest.fixture(scope="session")
def real_clips() -> Path | None:
    """Folder of real clips with captions.jsonl, or None where the checkout stands alone."""
    return REAL_CLIPS if (REAL_CLIPS / "captions.jsonl").exists() else None
