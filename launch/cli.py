"""The `longtake` command: parsing and dispatch. What a sub-command does lives in its own module.

Nothing heavy is imported before a sub-command runs, so `longtake --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from longtake.launch import data_commands, run_commands
from longtake.launch.command import Command, UserError

DESCRIPTION = (
    "Train your own video VAE and diffusion transformer, "
    "from raw captioned clips to samples and scores."
)
COMMANDS: tuple[Command, ...] = (*data_commands.COMMANDS, *run_commands.COMMANDS)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; `args.command` is the chosen `Command`."""
    parser = argparse.ArgumentParser(prog="longtake", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.title,
            description=command.description or command.title,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command. Exit code: 0 done, 1 failed, 2 usage, 75 preempted (call again), 130 ^C.

    A user's mistake (`ValueError`, `OSError`) prints as one line; LONGTAKE_DEBUG=1 shows its
    traceback. Anything else is a defect of ours and shows its traceback always.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.command.run(args)
    except KeyboardInterrupt:
        print("longtake: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `longtake plan-steps | head`: the reader has gone, say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("LONGTAKE_DEBUG") == "1":
            raise
        print(f"longtake {args.command.name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
