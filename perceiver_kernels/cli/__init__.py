"""The command line: `perceiver-kernels info|run|bench|memory|check`.

One module per command; each holds `HELP`, `add_arguments(parser)` and `execute(arguments, console) -> exit
code`. Exit codes: 0 done, 1 a result was wrong, 2 the request was wrong (one line on stderr says why), 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.report import CommandError

COMMANDS = ("info", "run", "bench", "memory", "check")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = build_parser().parse_args(argv)
    command = importlib.import_module(f"perceiver_kernels.cli.{arguments.command}")
    # With JSON on stdout everything meant for eyes goes to stderr, so that a pipe sees JSON alone.
    stream = sys.stderr if arguments.json == "-" else sys.stdout
    console = Console(stream, plain=arguments.plain, progress=arguments.progress)
    try:
        return command.execute(arguments, console)
    except CommandError as error:
        print(f"perceiver-kernels {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"perceiver-kernels {arguments.command}: interrupted; rows measured so far are kept",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader (head, less) is gone; a second failure at interpreter exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one sub-parser per command."""
    parser = argparse.ArgumentParser(
        prog="perceiver-kernels",
        description="Fused cross-attention for Perceiver: what is here, what it costs, whether it is right",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        module = importlib.import_module(f"perceiver_kernels.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        _add_common_arguments(command)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="PATH", help="also write the results as JSON ('-' for stdout)")
    parser.add_argument("--plain", action="store_true", help="plain text even where rich is installed")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress on stderr (default: only when stderr is a terminal)",
    )
