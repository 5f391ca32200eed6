"""What the members of one sample mean: which is the payload, what its captions and facts are."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from longtake.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

LATENT_EXTENSION = "safetensors"
PAYLOAD_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS, LATENT_EXTENSION)
META_EXTENSIONS = ("json", "txt")
MAX_CAPTION_CHARS = 20_000
MAX_NUMBER = 1e9  # of frames, pixels and the like: what the catalogue's int32 columns hold


class SampleError(ValueError):
    """A sample that cannot be used; the message is the reason."""


class NoCaptionError(SampleError):
    """A sample whose json is in order but says nothing of captions; `fields` is what it says."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__("caption missing")
        self.fields = fields


@dataclass(frozen=True)
class SampleMeta:
    """Captions by kind, and the fields of key.json (empty for key.txt)."""

    captions: dict[str, str]
    fields: dict[str, Any]

    def text(self, name: str) -> str | None:
        """A string field, or None where it is absent.

        Raises:
            SampleError: the field is something else.
        """
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value
        raise SampleError(f"{name} in the json is {type(value).__name__}, not a string")

    def number(self, name: str) -> float:
        """A finite number that must be there.

        Raises:
            SampleError: it is absent, no number, or beyond all use (over MAX_NUMBER).
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SampleError(f"{name} in the json is {value!r}, not a number")
        if not abs(value) <= MAX_NUMBER:  # NaN fails too
            raise SampleError(f"{name} in the json is not a number within {MAX_NUMBER:.0e}")
        return value

    def scores(self) -> dict[str, float]:
        """Numeric quality scores by name; NaN and infinity, and what is no number, are left out.

        Raises:
            SampleError: no mapping, or an integer beyond the range of floats.
        """
        scores = self.fields.get("scores") or {}
        if not isinstance(scores, dict):
            raise SampleError("scores in the json is not a mapping of names to numbers")
        try:
            return {
                str(name): float(value)
                for name, value in scores.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
        except OverflowError:
            raise SampleError(
                "scores in the json holds a number beyond the range of floats"
            ) from None


def pick_members(extensions: Iterable[str]) -> tuple[str, list[str]]:
    """The payload's extension and those of the captions (json first), as the shard spells them.

    Raises:
        SampleError: one is missing, or there are several payloads.
    """
    spelled = sorted(extensions)
    payloads = [ext for ext in spelled if ext.lower() in PAYLOAD_EXTENSIONS]
    if not payloads:
        raise SampleError("no video, image or latents")
    if len(payloads) > 1:
        raise SampleError(f"several payloads: {', '.join(payloads)}")
    metas = [ext for kind in META_EXTENSIONS for ext in spelled if ext.lower() == kind]
    if not metas:
        raise SampleError("caption missing: neither json nor txt")
    return payloads[0], metas


def parse_meta(ext: str, data: bytes) -> SampleMeta:
    """Captions and facts from key.json or key.txt.

    A byte order mark is passed over, and an integer source_id becomes a string.

    Raises:
        SampleError: not UTF-8, not JSON; a caption is missing, empty or over 20 000 characters.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"caption is not UTF-8: byte {error.start} of the {ext}") from None
    if ext == "txt":
        return SampleMeta(_check_captions({"dense": text.strip(), "short": text.strip()}), {})
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the json cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise SampleError("the json is not an object")
    if isinstance(fields.get("source_id"), int) and not isinstance(fields["source_id"], bool):
        fields["source_id"] = str(fields["source_id"])
    captions = fields.get("captions")
    if captions is None and "caption" in fields:  # video2dataset, img2dataset
        captions = {"dense": fields["caption"], "short": fields["caption"]}
    meta = SampleMeta(_check_captions(captions) if captions else {}, fields)
    check_text(fields)
    if not captions:
        raise NoCaptionError(fields)
    return meta


def check_text(fields: dict[str, Any]) -> None:
    """Raises:
    SampleError: a string somewhere in the json holds half of a surrogate pair.
    """
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError("the json is not UTF-8: it holds half a character") from None
    except RecursionError:
        raise SampleError("the json is nested too deeply") from None


def _check_captions(captions: object) -> dict[str, str]:
    if not captions:
        raise SampleError("caption missing")
    if not isinstance(captions, dict):
        raise SampleError("captions in the json is not a mapping of kinds to texts")
    for kind, caption in captions.items():
        if not isinstance(caption, str):
            raise SampleError(f"caption {kind!r} is not a text")
        if not caption.strip():
            raise SampleError(f"caption {kind!r} is empty")
        if len(caption) > MAX_CAPTION_CHARS:
            raise SampleError(f"caption {kind!r} has {len(caption)} characters, over the limit")
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError:
            raise SampleError(f"caption {kind!r} is not UTF-8: it holds half a character") from None
    return captions
