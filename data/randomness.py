"""Every random draw is a pure function of (seed, what is drawn): no generator state to store.

A sample's seed is derived from (run seed, sample_id, visit); each draw from it names its purpose
("crop", "noise", ...). So batches are bit-equal at any number of ranks and workers and after any
resume.
"""

import numpy as np
import torch
import xxhash

_MASK63 = (1 << 63) - 1


def derive_seed(*parts: int | str | np.integer) -> int:
    """63-bit seed of a sequence of integers and strings.

    Parts are type-tagged and length-prefixed, so ("a", 1), ("a1",) and ("a", "1") all differ.
    """
    encoded = bytearray()
    for part in parts:
        if isinstance(part, str):
            raw, tag = part.encode("utf-8"), b"s"
        else:
            number = int(part)
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            tag = b"i"
        encoded += tag + len(raw).to_bytes(4, "little") + raw
    return xxhash.xxh3_64_intdigest(bytes(encoded)) & _MASK63


def generator(seed: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Torch generator for one purpose of one sample."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose))


def numpy_rng(seed: int, purpose: str) -> np.random.Generator:
    """NumPy generator for one purpose of one sample."""
    return np.random.default_rng(derive_seed(seed, purpose))


def uniform(seed: int, purpose: str) -> float:
    """One draw in [0, 1) without building a generator (1 µs; a sample needs a few)."""
    return (derive_seed(seed, purpose) >> 10) / (1 << 53)


def hash_order(size: int, seed: int) -> np.ndarray:
    """A permutation of range(size), int64, that stays the same in every NumPy version.

    Sorts hashes of the positions; NumPy's own shuffles carry no promise between releases, and a
    plan must survive an upgrade.
    """
    return np.argsort(_hashes(np.arange(1, size + 1, dtype=np.uint64), seed), kind="stable")


def uniforms(numbers: np.ndarray, purpose: str) -> np.ndarray:
    """A draw in [0, 1) for each of `numbers` (N,) uint64, (N,) float64."""
    return (_hashes(numbers, derive_seed(purpose)) >> np.uint64(11)) / (1 << 53)


def _hashes(numbers: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014), (N,) uint64."""
    with np.errstate(over="ignore"):
        z = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
