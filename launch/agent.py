"""`python -m longtake.launch.agent`: torchrun, with two things that it lacks.

Its rendezvous listens on one interface, if one was chosen; and a rendezvous that was lost (the node
that holds it has gone, or another one stayed away too long) has an exit code of its own, which the
launcher answers with a new one. A plain torchrun ends with 1, as after a failed training.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousTimeoutError,
)
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

from longtake.launch.torchrun import EXIT_LOST
from longtake.train.interfaces import listen_on_one

IS_HOST = "is_host=1"  # among --rdzv-conf: this node holds the rendezvous


def main(argv: list[str]) -> int:
    """torchrun's arguments; 0, or EXIT_LOST. Other failures are torchrun's own exceptions."""
    args, held = parse_args(argv), None
    if args.rdzv_conf == IS_HOST:
        held = listen_on_one(int(args.rdzv_endpoint.rpartition(":")[2]))
    try:
        torchrun(argv)
    except (RendezvousConnectionError, RendezvousStateError, RendezvousTimeoutError) as error:
        print(f"longtake train: the rendezvous is lost: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST
    finally:
        del held
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
