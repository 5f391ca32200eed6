"""The training config outside a training process: for dry runs, plans and the text of an encode."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.errors import HydraException

from longtake.launch.command import UserError
from longtake.train.config import parse_config, to_tree
from longtake.train.schema import DiTRun, RunConfig, VAERun


def compose(overrides: Sequence[str]) -> VAERun | DiTRun:
    """`conf/` with KEY=VALUE overrides, checked as a training run checks them.

    UserError or ValueError names what is wrong.
    """
    try:
        with initialize_config_module("longtake.conf", version_base="1.3"):
            tree = hydra_compose("config", overrides=list(overrides))
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error
    return parse_config(tree)


def compose_dit(overrides: Sequence[str]) -> DiTRun:
    """`compose` for a place that needs a DiT's config."""
    config = compose(overrides)
    if not isinstance(config, DiTRun):
        raise ValueError(f"stage={config.stage} must be dit here: give the overrides of the DiT")
    return config


def as_json(config: RunConfig) -> str:
    """The resolved config as JSON, which is YAML too."""
    return json.dumps(to_tree(config), indent=2)
