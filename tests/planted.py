"""What an attacker would plant: bytes that run a command where they are unpickled."""

import os
import pickle
from pathlib import Path


def live_pickle(proof: Path) -> bytes:
    """A pickle that creates the file `proof`."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {proof}",)

    return pickle.dumps(Bomb())
