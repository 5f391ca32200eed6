"""Which members of a tar make up one sample: our shards, and those of other tools.

A key ends at the first dot, as WebDataset has it. What follows may be an extension (`a.mp4`,
`a.json`), a name and an extension (Energon: `a.video.mp4`, `a.meta.json`, `a.short.txt`), or the
rest of a key with dots (`v1.5.mp4`, `v1.5.txt`). A clip is paired only with captions whose names
leave no doubt; everything else is refused with a reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from longtake.data.decode import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from longtake.data.samples import LATENT_EXTENSION, PLAIN_TEXTS, SampleError
from longtake.data.shards.tars import Span

PAYLOAD_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS, LATENT_EXTENSION)
PAYLOAD_NAMES = {"video", "clip", "image", "img", "media"}  # of the clip within a sample
# Names of what describes a clip. Any other name might be the rest of another sample's key.
NAMES = {
    "json": {"meta", "metadata", "info", "caption", "captions", "annotation", "annotations"},
    "txt": {
        *PLAIN_TEXTS,
        *("dense", "short", "long", "brief", "detailed", "vague", "wrong"),
        *("prompt", "title", "description", "summary", "alt"),
        *("ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "zh"),
    },
}


@dataclass(frozen=True)
class Layout:
    """The members of one sample, as the shard spells their extensions.

    `metas` holds (spelling, meaning): json first, then texts; the meaning of `video.short.txt` is
    `short.txt` where the clip is `video.mp4`. `unknown` are jsons and texts of other names.
    """

    payload: str
    metas: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]


def split_dotted(key: str, members: dict[str, Span]) -> list[tuple[str, dict[str, Span]]]:
    """(key, members) of every sample that shares the part before the first dot, usually one.

    Keys have dots where clips of several names bring captions of their own names.
    """
    stems = {_stem(ext) for ext in members if _kind(ext) in PAYLOAD_EXTENSIONS}
    owners = {ext: _owner(ext, stems) for ext in members if _kind(ext) in NAMES}
    paired = {owner for owner in owners.values() if owner is not None}
    if not paired or (len(stems) == 1 and (stems & PAYLOAD_NAMES or "" in stems)):
        return [(key, members)]
    groups: dict[str, dict[str, Span]] = {stem: {} for stem in sorted(stems)}
    for ext, span in members.items():
        if is_part(ext):
            owner = owners.get(ext)
            # What belongs to no clip keeps its own name and is refused under it.
            stem = _stem(ext) if owner is None else owner
            groups.setdefault(stem, {})[ext[len(stem) + 1 :] if stem else ext] = span
    return [(f"{key}.{stem}" if stem else key, group) for stem, group in groups.items()]


def pick_members(extensions: Iterable[str]) -> Layout:
    """The clip of a sample and what describes it.

    Raises:
        SampleError: one is missing, there are several clips or jsons, or the names do not tell
            whether they belong together.
    """
    spelled = sorted(extensions)
    payloads = [ext for ext in spelled if _kind(ext) in PAYLOAD_EXTENSIONS]
    if not payloads:
        raise SampleError("no video, image or latents")
    if len(payloads) > 1:
        raise SampleError(f"several payloads: {', '.join(payloads[:5])}")
    (payload,) = payloads
    described = [ext for kind in NAMES for ext in spelled if _kind(ext) == kind]
    metas = [ext for ext in described if _belongs(ext, _stem(payload))]
    if not metas and described:
        raise SampleError(
            f"ambiguous: it is not clear that {described[0]} describes {payload}; name them "
            "KEY.mp4 and KEY.json or KEY.txt, or KEY.video.mp4 and KEY.meta.json"
        )
    if not metas:
        raise SampleError("caption missing: neither json nor txt")
    if len(metas) > 1 and _kind(metas[1]) == "json":
        raise SampleError(f"several json members: {metas[0]}, {metas[1]}")
    return Layout(
        payload,
        tuple((ext, _meaning(ext, _stem(payload))) for ext in metas),
        tuple(ext for ext in described if ext not in metas),
    )


def is_part(ext: str) -> bool:
    """Whether a member is a clip, json or txt, and no other modality such as mp3."""
    return _kind(ext) in PAYLOAD_EXTENSIONS or _kind(ext) in NAMES


def _owner(ext: str, stems: set[str]) -> str | None:
    """The name of the clip that a json or txt describes beyond doubt."""
    stem = _stem(ext)
    parent, _, name = stem.rpartition(".")
    if stem in stems:
        return stem
    return parent if parent in stems and name in NAMES[_kind(ext)] else None


def _belongs(ext: str, payload: str) -> bool:
    if _owner(ext, {payload}) is not None:
        return True
    return payload in PAYLOAD_NAMES and (not _stem(ext) or _stem(ext) in NAMES[_kind(ext)])


def _meaning(ext: str, payload: str) -> str:
    stem = _stem(ext)
    if payload and (stem == payload or stem.startswith(f"{payload}.")):
        stem = stem[len(payload) + 1 :]
    return f"{stem}.{_kind(ext)}" if stem else _kind(ext)


def _stem(ext: str) -> str:
    return ext.rpartition(".")[0]


def _kind(ext: str) -> str:
    return ext.rpartition(".")[2].lower()
