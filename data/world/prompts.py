"""Prompts without clips: what other programs draw videos for, which then are scored as ours are."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtake.data.world.clips import DEFAULT_SHAPES, Description, Shapes, describe
from longtake.data.world.language import ASKING


def write_prompts(
    path: Path | str,
    *,
    families: Sequence[str],
    num_prompts: int,
    kind: str = "dense",
    split: str = "val",
    shapes: Shapes = DEFAULT_SHAPES,
    seed: int = 0,
) -> int:
    """Write JSON lines, `num_prompts` for each family, of the clips that `make_clip` would draw.

    A line has key, family, form, split, kind, prompt, frames, height, width, fps, seed (the
    world's: with split and key it names the true clip) and expect (scores with their parameters,
    as `score_frames` takes them). The video drawn for it is to be called `<key>.mp4`, a single
    frame `<key>.png`. Returns the number of lines.

    Raises:
        ValueError: another kind, or what `check_request` refuses.
    """
    if kind not in ASKING:
        raise ValueError(
            f"kind={kind!r} must be one of {', '.join(ASKING)}: others ask for nothing"
        )
    plans = (
        describe(seed, split, index, families, shapes)
        for index in range(num_prompts * len(families))
    )
    lines = [json.dumps(_line(plan, kind), ensure_ascii=False) + "\n" for plan in plans]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _line(plan: Description, kind: str) -> dict[str, Any]:
    canvas = plan.canvas
    return {
        "key": plan.key,
        "family": plan.family,
        "form": plan.form,
        "split": canvas.split,
        "kind": kind,
        "prompt": plan.wording.captions(plan.words)[kind],
        "frames": canvas.frames,
        "height": canvas.height,
        "width": canvas.width,
        "fps": canvas.fps,
        "seed": plan.seed,
        "expect": plan.reading(kind).expect,
    }
