"""Weights that a new run starts from: another run's, or public ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from longtake.models.interop import dit_from_pretrained, vae_from_pretrained
from longtake.models.vae import VAE
from longtake.train import checkpoint
from longtake.train.optim import is_like, named_like
from longtake.train.runs import find_run, read_run_config, read_weights
from longtake.train.text_to_video import TextToVideo


def start_from(module: VAE | TextToVideo, place: str, patterns: Sequence[str] = ()) -> str:
    """Fill the module with the weights at `place`; says what was taken and what was not.

    place: a run or checkpoint (its EMA weights), a diffusers folder or a hub id, whose names of a
    DiT begin with `dit.` here. With patterns only what fits one of them is taken, and the rest
    stays as it is. ValueError, and nothing is taken, where of the wanted names any is missing,
    unexpected or of another shape; it lists them all.
    """
    given, mine = _weights_at(module, place), module.state_dict()
    wanted = tuple(patterns) or ("*",)
    named_like(mine, wanted, "init_names")
    taken = {n: t for n, t in given.items() if n in mine and is_like(n, wanted)}
    missing = [n for n in mine if n not in given and is_like(n, wanted)]
    unexpected = [n for n in given if n not in mine and is_like(n, wanted)]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is unexpected" for name in unexpected]
    problems += [
        f"{name} is {tuple(tensor.shape)}, the config makes it {tuple(mine[name].shape)}"
        for name, tensor in taken.items()
        if tensor.shape != mine[name].shape
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"init_from={place} does not fit the config; set its sizes alike, or name what to take "
            f"with init_names={list(patterns)}:\n  {listed}"
        )
    module.load_state_dict(taken, strict=False)
    return "\n".join(
        [
            f"init_from={place}: {len(taken)} of {len(mine)} tensors are taken",
            *(f"  stays as it was: {line}" for line in _summary(mine.keys() - taken.keys())),
            *(f"  is not taken: {line}" for line in _summary(given.keys() - taken.keys())),
        ]
    )


def _weights_at(module: VAE | TextToVideo, place: str) -> dict[str, Tensor]:
    """Tensors under the names that the module's own have."""
    if is_diffusers(place):
        if isinstance(module, VAE):
            return vae_from_pretrained(place).state_dict()
        dit = dit_from_pretrained(place)
        return {f"dit.{name}": tensor for name, tensor in dit.state_dict().items()}
    run = find_run(Path(place))
    config, stage = read_run_config(run), "vae" if isinstance(module, VAE) else "dit"
    if config.stage != stage:
        raise ValueError(
            f"init_from={place} is a run of stage={config.stage}, this is stage={stage}"
        )
    return read_weights(run, config)


def is_diffusers(place: str) -> bool:
    """Whether the place is a folder that `save_pretrained` wrote, or no folder but a hub id."""
    path = Path(place)
    if not path.is_dir() or (path / "model_index.json").is_file():
        return True
    return (path / "config.json").is_file() and not (path / checkpoint.MANIFEST).is_file()


def _summary(names: Iterable[str]) -> list[str]:
    """Names with their numbers as stars, each with how many it stands for: `blocks.*.x (30)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
