"""The model card that goes with an exported pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longtake.data.config import BucketConfig
from longtake.train.codec import Codec
from longtake.train.frame_rate import DEFAULT_FPS, drawn_rate
from longtake.train.runs import LoadedDiT

CARD = """---
library_name: diffusers
pipeline_tag: {tag}
tags: [{tag}, longtake]
---

# {name}

A video diffusion transformer with its VAE and text encoder, trained from scratch with Longtake.
It draws {frames} frames of {width}×{height} pixels at {fps:g} frames per second.

## Use

{uses}`max_sequence_length={max_length}` is part of the model: it was trained with captions padded
to that length, and another value changes what it draws.

## Sizes

| part | parameters | shape |
|---|---|---|
| transformer | {dit_params} | {depth} layers, width {hidden}, patch {patch} |
| VAE | {vae_params} | strides {strides} (time, height, width), {channels} channels |
| text encoder | {text_params} | {text_kind} |

Trained for {step} optimizer steps (weights: {weights}); sampler: {solver} with shift
{shift:g}. `config.yaml` is the full training config.

## Training data

{data}
`data_manifest.json` has the same with fingerprints. Captions: {captions}.

## Limits

It knows what it was trained on and nothing else. The data's licences above apply to what you do
with it.
"""

TEXT = """```python
from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained("PATH")
video = pipe(
    prompt="{prompt}",
    height={height}, width={width}, num_frames={frames},
    num_inference_steps={steps}, guidance_scale={guidance:g},{negative}
    max_sequence_length={max_length},
).frames[0]
export_to_video(video, "sample.mp4", fps={fps:g})
```

"""

IMAGE = """From an image (it becomes the first frame):

```python
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

pipe = WanImageToVideoPipeline.from_pretrained("PATH")
image = load_image("first.png")
video = pipe(image=image, prompt="…", height={height}, width={width}, num_frames={frames},
             num_inference_steps={steps}, guidance_scale={guidance:g},{negative}
             max_sequence_length={max_length}).frames[0]
export_to_video(video, "sample.mp4", fps={fps:g})
```

"""

FIRST_LAST = """With `last_image=load_image("last.png")` besides, the video ends with that frame.

"""
SOLVERS = {"euler": "flow-match Euler", "unipc": "UniPC"}
USES = {"t2v": TEXT, "i2v": IMAGE, "first_last": FIRST_LAST}


def model_card(
    run: LoadedDiT,
    codec: Codec,
    data: list[dict[str, Any]],
    tasks: Sequence[str],
    bucket: BucketConfig,
) -> str:
    """README.md of the exported folder, Markdown; `tasks` are those of USES that it draws, `bucket`
    is the size that the examples ask for."""
    config = run.config
    assert codec.vae is not None
    negative = config.samples.negative_prompt
    values = {
        "name": run.place.folder.name,
        "frames": bucket.frames,
        "height": bucket.height,
        "width": bucket.width,
        "fps": drawn_rate(config, bucket.frames) or DEFAULT_FPS,
        "steps": config.samples.steps,
        "guidance": config.samples.guidance_scale,
        "negative": f" negative_prompt={negative!r}," if negative else "",
        "max_length": config.text.max_length,
        "prompt": (config.samples.prompts or ["a red circle moves left"])[0],
    }
    share = config.data.train[0].captions
    return CARD.format(
        **values,
        tag="text-to-video" if "t2v" in tasks else "image-to-video",
        uses="".join(USES[task].format(**values) for task in tasks),
        dit_params=_count(run.dit),
        vae_params=_count(codec.vae),
        text_params=_count(run.text),
        depth=config.model.depth,
        hidden=config.model.hidden_size,
        patch="×".join(map(str, config.model.patch_size)),
        strides="×".join(map(str, codec.strides)),
        channels=codec.channels,
        text_kind=config.text.path or "UMT5 encoder over bytes, trained along",
        step=run.place.step,
        weights=run.weights,
        solver=SOLVERS[config.samples.solver],
        shift=config.samples.shift,
        data=_data_table(data),
        captions=", ".join(f"{kind} {value:g}" for kind, value in share.items()),
    )


def _count(module: Any) -> str:
    total = sum(parameter.numel() for parameter in module.parameters())
    return f"{total / 1e6:.2f} M"


def _data_table(data: list[dict[str, Any]]) -> str:
    lines = ["| dataset | samples | licences | weight |", "|---|---|---|---|"]
    for entry in data:
        licences = entry["licences"] or {}
        listed = ", ".join(f"{name} ({count})" for name, count in licences.items()) or "not read"
        name = entry.get("dataset") or entry["share"]["path"]
        samples = entry["samples"] if entry["samples"] is not None else "not read"
        lines.append(f"| {name} | {samples} | {listed} | {entry['share']['weight']:g} |")
    return "\n".join(lines) + "\n"
