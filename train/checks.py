"""Two checks of values that a user gave; the message is the whole error."""

from __future__ import annotations

from typing import Any


def require(holds: bool, message: str) -> None:
    """ValueError with the message unless it holds."""
    if not holds:
        raise ValueError(message)


def choice(key: str, value: Any, allowed: tuple[str, ...], remedy: str = "") -> None:
    """ValueError unless the value of a key is one of those allowed."""
    text = f"{key}={value} must be one of {', '.join(allowed)}"
    require(value in allowed, f"{text}: {remedy}" if remedy else text)
