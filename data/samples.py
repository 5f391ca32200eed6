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


class SampleError(ValueError):
    """A sample that cannot be used; the message is the reason."""


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
            SampleError: it is absent or no number.
        """
        value = self.fields.get(name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise SampleError(f"{name} in the json is {value!r}, not a number")
        return value

    def scores(self) -> dict[str, float]:
        """Numeric quality scores by name."""
        scores = self.fields.get("scores") or {}
        if not isinstance(scores, dict):
            raise SampleError("scores in the json is not a mapping of names to numbers")
        return {
            str(name): float(value)
            for name, value in scores.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }


def pick_members(extensions: Iterable[str]) -> tuple[str, str]:
    """The payload's and the captions' extension among a sample's members.

    Raises:
        SampleError: one is missing, or there are several payloads.
    """
    present = set(extensions)
    payloads = [ext for ext in PAYLOAD_EXTENSIONS if ext in present]
    if not payloads:
        raise SampleError("no video, image or latents")
    if len(payloads) > 1:
        raise SampleError(f"several payloads: {', '.join(payloads)}")
    for ext in META_EXTENSIONS:
        if ext in present:
            return payloads[0], ext
    raise SampleError("caption missing: neither json nor txt")


def parse_meta(ext: str, data: bytes) -> SampleMeta:
    """Captions and facts from key.json or key.txt.

    Raises:
        SampleError: not UTF-8, not JSON; a caption is missing, empty or over 20 000 characters.
    """
    try:
        text = data.decode("utf-8")
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
    captions = fields.get("captions")
    if captions is None and "caption" in fields:  # video2dataset, img2dataset
        captions = {"dense": fields["caption"], "short": fields["caption"]}
    return SampleMeta(_check_captions(captions), fields)


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
