"""Weights that a new run starts from: another run's, or public ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.models.dit import DiTConfig
from longtake.models.interop import dit_from_pretrained, vae_from_pretrained
from longtake.models.text import TextConfig
from longtake.models.vae import VAE
from longtake.models.vae_config import VAEConfig
from longtake.train import checkpoint
from longtake.train.optim import is_like, named_like
from longtake.train.runs import find_run, read_run_config, read_weights
from longtake.train.schema import VAERun
from longtake.train.text_to_video import TextToVideo

# Keys that change what tensors compute, but neither their names nor their shapes, with patterns of
# the tensors.
DECISIVE = {
    "vae.residual": ["*"],
    "vae.patch_size": ["encoder.conv_in.*", "decoder.conv_out.*"],
    "vae.temporal_downsample": ["*.time.*"],
    "model.num_heads": ["dit.blocks.*_attn.*"],
    "model.eps": ["dit.blocks.*", "dit.head.*"],
    "model.absolute_positions": ["dit.blocks.*"],
    "model.patch_size": ["dit.patch_embed.*", "dit.head.*"],
    "prediction": ["dit.head.*"],
    "text.kind": ["text.*"],
    "numbers.sources": ["numbers.*"],
}


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and the config's keys by which they were trained."""

    tensors: dict[str, Tensor]
    keys: Mapping[str, Any]


def start_from(
    module: VAE | TextToVideo,
    place: str,
    patterns: Sequence[str] = (),
    prediction: str = "velocity",
    rest_learns: bool = True,
) -> str:
    """Fill the module with the weights at `place`; says what was taken and what was not.

    place: a run or checkpoint (its EMA weights), a diffusers folder or a hub id, whose names of a
    DiT begin with `dit.` here. With patterns only what fits one of them is taken, and the rest
    stays as it is. `prediction` is that of a DiT. ValueError, and nothing is taken, where of the
    wanted names any is missing, unexpected, of another shape, or computes something else under this
    config, or where anything stays as it is that will not learn (`rest_learns`); it lists them all.
    """
    there, here = _weights_at(module, place), _weights_of(module, prediction)
    given, mine = there.tensors, here.tensors
    wanted = tuple(patterns) or ("*",)
    named_like(mine, wanted, "init_names")
    taken = {n: t for n, t in given.items() if n in mine and is_like(n, wanted)}
    missing = [n for n in mine if n not in given and is_like(n, wanted)]
    unexpected = [n for n in given if n not in mine and is_like(n, wanted)]
    concerned = [n for n in mine | given if is_like(n, wanted)]
    problems = [
        f"{key} is {there.keys[key]} there, the config has {here.keys[key]}: "
        f"{', '.join(affected)} would compute something else"
        for key, affected in DECISIVE.items()
        if any(is_like(name, affected) for name in concerned)
        and key in here.keys.keys() & there.keys.keys()
        and here.keys[key] != there.keys[key]
    ]
    problems += [f"{name} is missing" for name in missing]
    problems += [f"{name} is unexpected" for name in unexpected]
    problems += [
        f"{name} is {tuple(tensor.shape)}, the config makes it {tuple(mine[name].shape)}"
        for name, tensor in taken.items()
        if tensor.shape != mine[name].shape
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"init_from={place} does not fit the config; set its keys alike, or name what to take "
            f"with init_names={list(patterns)}:\n  {listed}"
        )
    rest = _summary(mine.keys() - taken.keys())
    if rest and not rest_learns:
        listed = "\n  ".join(rest)
        raise ValueError(
            f"init_from={place} with init_names={list(patterns)} leaves tensors at their initial "
            "values, for good, because with lora only adapters are trained; take them too, leave "
            f"them out of the config, or first train them without lora:\n  {listed}"
        )
    module.load_state_dict(taken, strict=False)
    return "\n".join(
        [
            f"init_from={place}: {len(taken)} of {len(mine)} tensors are taken",
            *(f"  stays as it was: {line}" for line in rest),
            *(f"  is not taken: {line}" for line in _summary(given.keys() - taken.keys())),
        ]
    )


def _weights_at(module: VAE | TextToVideo, place: str) -> Weights:
    """What is there, under the names that the module's own have."""
    if is_diffusers(place):
        if isinstance(module, VAE):
            return _weights_of(vae_from_pretrained(place), "")
        dit = dit_from_pretrained(place)
        return _weights_of(TextToVideo(dit, None, 0), "velocity")
    run = find_run(Path(place))
    config, stage = read_run_config(run), "vae" if isinstance(module, VAE) else "dit"
    if config.stage != stage:
        raise ValueError(
            f"init_from={place} is a run of stage={config.stage}, this is stage={stage}"
        )
    if isinstance(config, VAERun):
        keys = _keys(vae=config.vae)
    else:
        keys = _keys(model=config.model, text=config.text) | {"prediction": config.prediction}
        keys |= {"numbers.sources": config.numbers.embedded}
    return Weights(read_weights(run, config), keys)


def _weights_of(module: VAE | TextToVideo, prediction: str) -> Weights:
    if isinstance(module, VAE):
        return Weights(module.state_dict(), _keys(vae=module.config))
    keys = _keys(model=module.dit.config) | {"prediction": prediction}
    if module.text is not None:
        keys |= _keys(text=module.text.config)
    if module.numbers is not None:
        keys |= {"numbers.sources": module.numbers.sources}
    return Weights(module.state_dict(), keys)


def _keys(**sections: VAEConfig | DiTConfig | TextConfig) -> dict[str, Any]:
    return {
        f"{s}.{key}": value for s, config in sections.items() for key, value in vars(config).items()
    }


def is_diffusers(place: str) -> bool:
    """Whether the place is a folder that `save_pretrained` wrote, or no folder but a hub id.

    A pipeline is one by its index or by the modules it holds.
    """
    path = Path(place)
    parts = "model_index.json", "transformer/config.json", "vae/config.json"
    if not path.is_dir() or any((path / part).is_file() for part in parts):
        return True
    return (path / "config.json").is_file() and not (path / checkpoint.MANIFEST).is_file()


def _summary(names: Iterable[str]) -> list[str]:
    """Names with their numbers as stars, each with how many it stands for: `blocks.*.x (30)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
