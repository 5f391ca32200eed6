"""The procedural world: captioned video with exact truth, and scores that need no judge model."""

from .clips import WorldClip, make_clip
from .families import FAMILIES

__all__ = ["FAMILIES", "WorldClip", "make_clip"]
