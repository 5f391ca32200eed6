"""Who turned captions into cached ids or embeddings: known by its bytes, not by its place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import xxhash

from longtake.data.config import CacheConfig
from longtake.data.shards.node_cache import cache_folder
from longtake.models.text import TextConfig
from longtake.train.run_folder import write_json

WEIGHTS = ("*.safetensors", "*.bin")  # where the first kind is there, the second is not loaded
ABOUT = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model")
_CHUNK = 2**24


def text_hash(config: TextConfig) -> str:
    """Identity (hex) of a tokenizer and encoder.

    Of a folder: names and bytes of its config, tokenizer and weights, so that it may move but not
    change. Of a hub id: the id. The embedded byte tokenizer is always the same; words are known by
    the number of rows they are hashed to.
    """
    if config.kind == "words":
        return hashlib.sha256(f"words:{config.vocab_size}".encode()).hexdigest()
    folder, identity = Path(config.path), config.path
    if config.kind == "pretrained" and folder.is_dir():
        identity = "\n".join(f"{path.name} {_file_hash(path)}" for path in identity_files(folder))
    return hashlib.sha256(f"{config.kind}:{identity}".encode()).hexdigest()


def identity_files(folder: Path) -> list[Path]:
    """The files that decide what a pretrained encoder computes; ValueError without weights."""
    weights = next((found for kind in WEIGHTS if (found := sorted(folder.glob(kind)))), [])
    if not weights:
        raise ValueError(f"text.path={folder} holds no weights ({', '.join(WEIGHTS)})")
    about = {path for pattern in ABOUT for path in folder.glob(pattern) if path.is_file()}
    return sorted(about) + weights


def _file_hash(path: Path) -> str:
    """xxh3-128 (hex) of a file; the cache of this node keeps it while size and time stay."""
    state = path.stat()
    key = [str(path.resolve()), state.st_size, state.st_mtime_ns]
    name = xxhash.xxh3_128_hexdigest(key[0].encode())
    note = cache_folder(CacheConfig()) / "file_hashes" / f"{name}.json"
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if known.get("key") != key:
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        known = {"key": key, "xxh3": digest.hexdigest()}
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, known)
    return known["xxh3"]
