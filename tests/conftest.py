"""Shared settings: one torch thread, so that forked gloo ranks cannot deadlock, and no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import json
import warnings
from pathlib import Path

import pytest
import torch

from longtake.data.decode import encode_video
from longtake.data.world import make_clip

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
REAL_CLIPS = ROOT.parent / "shared" / "videos"


@pytest.fixture(scope="session", autouse=True)
def _cache_of_plans(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled plans go with the session, in commands that it starts too."""
    os.environ["LONGTAKE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of clips with captions.jsonl: real ones, or generated ones where there are none."""
    if (REAL_CLIPS / "captions.jsonl").exists():
        return REAL_CLIPS
    warnings.warn(f"{REAL_CLIPS} is not there: generated clips stand in", stacklevel=1)
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for index in range(10):
        clip = make_clip(0, "train", index, families=["move"], frames=17, height=64, width=96)
        (folder / f"{index}.mp4").write_bytes(encode_video(clip.frames, clip.fps))
        lines.append(json.dumps({"file": f"{index}.mp4", "caption": clip.captions["dense"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
