"""A batch as bytes, safetensors throughout: for other ranks that work on the same samples."""

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from longtake.data.loader import Batch
from longtake.data.plan.planned import Exclusion, PlannedSample
from longtake.data.reader import Clip
from longtake.data.segments import Segment

_NOTHING = torch.empty(0)  # stands in the facts where a tensor travels beside them


def to_bytes(batch: Batch) -> bytes:
    """The batch for `from_bytes`: tensors as "<clip>.<name>", all the rest as JSON in `facts`."""
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, clip in enumerate(batch.clips)
        for name, tensor in clip.tensors.items()
    }
    clips = [clip.with_tensors(dict.fromkeys(clip.tensors, _NOTHING)) for clip in batch.clips]
    facts = json.dumps(asdict(replace(batch, clips=clips)), default=lambda tensor: None)
    return save(tensors | {"facts": torch.frombuffer(bytearray(facts.encode()), dtype=torch.uint8)})


def from_bytes(payload: bytes) -> Batch:
    """The batch as it was."""
    tensors = load(payload)
    facts = json.loads(bytes(tensors.pop("facts").numpy()))
    clips = [_clip(clip, f"{number}.", tensors) for number, clip in enumerate(facts["clips"])]
    excluded = [Exclusion(**each) for each in facts["excluded"]]
    return Batch(**facts | {"clips": clips, "excluded": excluded})


def _clip(facts: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Clip:
    plan = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["sample"].items()}
    places = {name: tuple(segment["places"]) for name, segment in facts["segments"].items()}
    segments = {name: Segment(_NOTHING, where) for name, where in places.items()}
    clip = Clip(**facts | {"sample": PlannedSample(**plan), "segments": segments})
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return clip.with_tensors(own)
