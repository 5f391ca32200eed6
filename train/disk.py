"""Tensors on a disk: `engine.offload=nvme`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def zeros_on_disk(like: torch.Tensor, folder: Path) -> torch.Tensor:
    """Zeros of the shape and dtype of a CPU tensor, in a file that is mapped into memory.

    The system keeps in memory what it has room for and writes the rest out. The file has no name,
    so it goes with the process, however that ends; its space is taken now, so that a full disk is
    an error here and not a signal in the middle of a step.

    Errors: ValueError, naming engine.offload_path, where the file cannot be made.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="longtake-moments-") as file:
            os.posix_fallocate(file.fileno(), 0, like.nbytes)
            flat = torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype)
    except OSError as error:
        raise ValueError(
            f"engine.offload_path={folder} cannot hold {like.nbytes / 2**20:.0f} MiB of moments "
            f"({error.strerror}): name a folder on a local disk with room for 8 bytes per parameter"
        ) from error
    return flat.view_as(like)
