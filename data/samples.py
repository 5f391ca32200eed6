"""What json and txt members say of a sample: its captions by kind, and facts."""

import json
import math
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LATENT_EXTENSION = "safetensors"
PLAIN_TEXTS = ("", "caption", "captions", "text")  # names of a txt that say nothing of its kind
PLAIN_KINDS = ("dense", "short")  # what a plain caption serves as
MAX_CAPTION_CHARS = 20_000
MAX_NUMBER = 1e9  # of frames, pixels and the like: what the catalogue's int32 columns hold


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


def parse_meta(ext: str, data: bytes) -> SampleMeta:
    """Captions and facts of a sample that has one json or txt; see `combine_meta`."""
    return combine_meta([(ext, data)])


def combine_meta(members: Sequence[tuple[str, bytes]], *, is_known: bool = False) -> SampleMeta:
    """Captions and facts from the json and txt members of a sample, given as (extension, bytes).

    A json says `captions` (kind → text, or a list of texts) or `caption`; `short.txt` is the
    caption of kind short. A plain caption (`caption`, the first of a list, `txt`, `caption.txt`)
    serves as the kinds dense and short where nothing else does, else it is the kind caption. Byte
    order marks are passed over, and an integer source_id becomes a string. Members that are known
    (by their hash) to have passed here before are not checked again, which takes half the time.

    Raises:
        SampleError: not UTF-8, not JSON; two captions of one kind differ; a caption is missing,
            empty or over 20 000 characters.
    """
    fields: dict[str, Any] = {}
    captions: dict[str, str] = {}
    plain: list[tuple[str, str]] = []  # (member, caption)
    for ext, data in members:
        try:
            text = data.removeprefix(BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"caption is not UTF-8: byte {error.start} of the {ext}") from None
        stem, _, kind = ext.rpartition(".")
        if kind == "json":
            fields = _parse_json(text)
            named, said = _json_captions(fields, is_known)
        elif stem in PLAIN_TEXTS:
            named, said = {}, text.strip()
        else:
            named, said = {stem: text.strip()}, ""
        if said:
            plain.append((ext, said))
        for name, caption in named.items():
            if captions.setdefault(name, caption) != caption:
                raise SampleError(f"ambiguous: two captions of kind {name!r} differ")
    if len({caption for _, caption in plain}) > 1:
        names = " and ".join(ext for ext, _ in plain)
        raise SampleError(f"ambiguous: the captions of {names} differ")
    for _, caption in plain[:1]:
        free = [kind for kind in PLAIN_KINDS if kind not in captions]
        if not free and caption not in captions.values():
            free = ["caption"]
        captions.update(dict.fromkeys(free, caption))
    if not is_known:
        _check_captions(captions)
        check_text(fields)
    return SampleMeta(captions, fields)


def _parse_json(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the json cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise SampleError("the json is not an object")
    if isinstance(fields.get("source_id"), int) and not isinstance(fields["source_id"], bool):
        fields["source_id"] = str(fields["source_id"])
    return fields


def _json_captions(fields: dict[str, Any], is_known: bool) -> tuple[dict[str, str], str]:
    """Captions by kind and the plain one ("" for none), unchecked."""
    captions, plain = fields.get("captions"), fields.get("caption")
    if isinstance(captions, list):
        captions = {f"caption_{number}": text for number, text in enumerate(captions, start=1)}
        plain = plain or captions.get("caption_1")
    if captions and not isinstance(captions, dict):
        raise SampleError("captions in the json is neither a mapping of kinds to texts nor a list")
    if plain is not None and not isinstance(plain, str):
        raise SampleError(f"caption in the json is {type(plain).__name__}, not a text")
    if captions and not is_known:
        _check_captions(captions)
    return captions or {}, (plain or "").strip()


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


def _check_captions(captions: dict[str, Any]) -> None:
    if not captions:
        raise SampleError("caption missing")
    for kind, caption in captions.items():
        if not isinstance(caption, str):
            raise SampleError(f"caption {kind!r} is not a text")
        if not caption.strip():
            raise SampleError(f"caption {kind!r} is empty")
        if len(caption) > MAX_CAPTION_CHARS:
            raise SampleError(f"caption {kind!r} has {len(caption)} characters, over the limit")
        try:
            f"{kind}{caption}".encode()
        except UnicodeEncodeError:
            raise SampleError(f"caption {kind!r} is not UTF-8: it holds half a character") from None
