"""The command line: `perceiver-kernels info|run|bench|memory|plot|check`.

One module per command; each holds `HELP`, `add_arguments(parser)` and `execute(arguments, console) -> exit
code`. Exit codes: 0 done, or the reader of a pipe left; 1 a result was wrong; 2 the request was wrong or its
results could not be written (one line on stderr says why); 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from perceiver_kernels.cli import options
from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.report import CommandError, emit
from perceiver_kernels.version import __version__

COMMANDS = ("info", "run", "bench", "memory", "plot", "check")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    program = "perceiver-kernels"
    try:
        if sys.stdout is None:
            raise CommandError("cannot write to stdout: it is closed")
        arguments = build_parser().parse_args(argv)
        program += f" {arguments.command}"
        command = importlib.import_module(f"perceiver_kernels.cli.{arguments.command}")
        # With JSON on stdout everything meant for eyes goes to stderr, so that a pipe sees JSON alone.
        stream = sys.stderr if arguments.json == "-" else sys.stdout
        console = Console(stream, plain=arguments.plain, progress=arguments.progress)
        return command.execute(arguments, console)
    except CommandError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{program}: interrupted; {str(error) or 'no results were written'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help goes the way of all output."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def print_help(self, file: IO[str] | None = None) -> None:
        emit(self.format_help().rstrip(), file or sys.stdout)


class Version(argparse.Action):
    """Prints the version, the way of all output."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        emit(f"{parser.prog} {__version__}", sys.stdout)
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with one sub-parser per command."""
    parser = Parser(
        prog="perceiver-kernels",
        description="Fused cross-attention for Perceiver: what is here, what it costs, whether it is right",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name in COMMANDS:
        module = importlib.import_module(f"perceiver_kernels.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        _add_common_arguments(command)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=options.path, action=options.Once, metavar="PATH",
        help="also write the results as JSON ('-' for stdout)",
    )  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="plain text even where rich is installed")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress on stderr (default: only when stderr is a terminal)",
    )
