"""The `longtake` command: parsing and dispatch. What a sub-command does lives in its own module.

Nothing heavy is imported before a sub-command runs, so `longtake --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from longtake.launch import data_commands, encode_command, evaluate_command, run_commands
from longtake.launch.command import Command, UserError

DESCRIPTION = (
    "Train your own video VAE and diffusion transformer, "
    "from raw captioned clips to samples and scores."
)
COMMANDS: tuple[Command, ...] = (
    *data_commands.COMMANDS,
    *encode_command.COMMANDS,
    *run_commands.COMMANDS,
    *evaluate_command.COMMANDS,
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None, and where the text names its own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; `args.command` is the chosen `Command`."""
    parser = argparse.ArgumentParser(prog="longtake", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.title,
            description=command.title,
            formatter_class=HelpFormatter,
            allow_abbrev=False,  # `--npr 2` must not mean what only `--nproc 2` is known to mean
        )
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; words behind options join the command's list argument."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    trailing = args.command.trailing
    if rest and (not trailing or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(args, trailing, [*getattr(args, trailing), *rest])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command. Exit code: 0 done, 1 failed, 2 usage, 75 preempted (call again), 130 ^C.

    A user's mistake (`ValueError`, `OSError`) prints as one line; LONGTAKE_DEBUG=1 shows its
    traceback. Anything else is a defect of ours and shows its traceback always.
    """
    args = parse(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
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
