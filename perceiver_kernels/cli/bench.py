"""`perceiver-kernels bench REGIME`: named cases against named stock implementations, correctness first.

For every case and pass the specification is computed in fp64, our result is judged against it, and only a
result that passes is timed; a wrong one ends the command with exit code 1. A peer that cannot run keeps its
row, with the reason; so does whatever runs out of memory. `--compare` puts the rows beside those of an older
report.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.cli import compare, info, options, reading
from perceiver_kernels.cli.bencher import Bench
from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.regimes import REGIMES, Regime
from perceiver_kernels.cli.report import CommandError, Report, check_apart
from perceiver_kernels.cli.rerun import DTYPES, default_dtype
from perceiver_kernels.cli.subject import Pass
from perceiver_kernels.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, backends, candidates, use_backend

HELP = "time named cases against named stock implementations; refuses to time a wrong result"
ALL = "all"
"""In the place of a regime's name: every regime, one after the other; of a case's name: every case of a regime."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "what", type=options.name_of("regime", (*REGIMES, ALL)), metavar="REGIME",
        help=f"{_by_regime(lambda regime: regime.meaning)}; {ALL}: each of them",
    )  # fmt: skip
    parser.add_argument(
        "--case", nargs="+", action=options.Merged, metavar="NAME",
        help=f"named sizes, {ALL} for every case of the regime (default: "
        f"{_by_regime(lambda regime: ' '.join(regime.default_cases))})",
    )  # fmt: skip
    parser.add_argument(
        "--passes", type=options.names, action=options.Merged, metavar="NAME,...",
        help=f"what to measure (default: {_by_regime(lambda regime: ','.join(regime.default_passes))})",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=options.peers, action=options.Merged, metavar="NAME,...",
        help="stock implementations (default: all that the device has; 'none' for none)",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes of stock PyTorch"
    )
    parser.add_argument(
        "--seconds", type=options.seconds, default=Bench.seconds,
        help="sampling time per implementation and pass (default: %(default)s)",
    )  # fmt: skip
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--max-inputs", type=options.count, metavar="M",
        help="cut cases to M inputs, or queries and keys (default: as many as they have on a GPU; on a CPU "
        f"{_by_regime(lambda regime: str(regime.cpu_inputs), lambda regime: regime.cpu_inputs is not None)}; "
        "there the batch, and latents and their channels, or heads, are cut too)",
    )  # fmt: skip
    lengths.add_argument(
        "--sizes", type=options.sizes, action=options.Merged, metavar="M,...",
        help=f"each case at these sizes, like 1024,64K,1M ({_by_regime(lambda regime: str(regime.axis), _has_axis)})",
    )  # fmt: skip
    parser.add_argument(
        "--csv", type=options.file, action=options.Once, metavar="PATH", help="also write the rows as CSV"
    )
    parser.add_argument(
        "--compare", type=options.file, metavar="OLD.json", help="show the rows beside those of an older report"
    )
    parser.add_argument(
        "--tolerance", type=options.percent, metavar="PERCENT",
        help=f"more than this over the old time or memory is a regression (default: {compare.TOLERANCE:g})",
    )  # fmt: skip
    parser.add_argument(
        "--fail-on-regression", action="store_true",
        help="exit code 1 where a row of ours is one, or no row could be compared, with --compare",
    )  # fmt: skip
    add_device_arguments(parser)


def _has_axis(regime: Regime) -> bool:
    return regime.axis is not None


def _by_regime(told: Callable[[Regime], str], which: Callable[[Regime], bool] = lambda regime: True) -> str:
    return "; ".join(f"{regime.name}: {told(regime)}" for regime in REGIMES.values() if which(regime))


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say where and in what to compute."""
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--backend", type=options.names_of("backend", BACKENDS), action=options.Merged, metavar="NAME,...",
        help="allow these backends only, tried in this order (default: all that are available)",
    )  # fmt: skip


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Run the benchmark; exit code 1 when a result of ours was wrong, or a regression that was to fail."""
    regimes = list(REGIMES.values()) if arguments.what == ALL else [REGIMES[arguments.what]]
    tasks = planned(regimes, arguments.case, arguments.passes)
    _check_together(arguments, regimes)
    check_apart({"--json": arguments.json, "--csv": arguments.csv})
    older = reading.load(Path(arguments.compare), "--compare") if arguments.compare else None
    device, dtype = device_and_dtype(arguments)
    compiled = device.type == "cuda" and not arguments.no_compile
    report = Report(f"bench {arguments.what}", arguments.json, csv=arguments.csv)
    with backend_scope(arguments.backend), report:
        bench = Bench(
            report, console, device, dtype, seconds=arguments.seconds, max_inputs=arguments.max_inputs,
            backends=allowed_backends(arguments.backend),
        )  # fmt: skip
        console.line(
            f"{info.device_line(report.content['environment'])}; {str(dtype).removeprefix('torch.')}"
        )
        bench.measure_ceilings()
        for task in tasks:
            for name in task.cases:
                for size in arguments.sizes or [None]:
                    case = task.regime.sizes(name, device, arguments.max_inputs, size)
                    bench.case(task.regime, case, task.passes, arguments.peers, compiled=compiled, size=size)
        regressed = older is not None and compare.show(older, report.content, console, arguments.tolerance)
    return 1 if bench.failures or (regressed and arguments.fail_on_regression) else 0


def _check_together(arguments: argparse.Namespace, regimes: Sequence[Regime]) -> None:
    """Options that ask for something of others."""
    if arguments.sizes and not all(map(_has_axis, regimes)):
        names = ", ".join(regime.name for regime in REGIMES.values() if regime.axis)
        raise CommandError(f"argument --sizes: must be given with one of {names}, got {arguments.what}")
    if arguments.max_inputs and all(regime.cpu_inputs is None for regime in regimes):
        raise CommandError(f"argument --max-inputs: {arguments.what} have no number of inputs to cut")
    for option, given in (
        ("--tolerance", arguments.tolerance is not None), ("--fail-on-regression", arguments.fail_on_regression),
    ):  # fmt: skip
        if given and not arguments.compare:
            raise CommandError(f"argument {option}: must be given with --compare")


@dataclasses.dataclass(frozen=True)
class Task:
    """What is measured of one regime: names of cases, and passes."""

    regime: Regime
    cases: tuple[str, ...]
    passes: list[Pass]


def planned(regimes: Sequence[Regime], cases: Sequence[str] | None, passes: Sequence[str] | None) -> list[Task]:
    """Return what is asked for of each regime: its own defaults, or the named cases and passes that it has.

    Args:
        regimes: those to measure.
        cases: names, each argument one or more separated by commas; ALL alone for every case; None for each regime's own.
        passes: names; None for each regime's own.

    Raises:
        CommandError: no regime has a case or a pass of that name, or none has both.
    """
    named = None if cases is None else _named_cases(regimes, ",".join(cases))
    wanted = None if passes is None else _known("--passes", "pass", [each.passes for each in regimes], passes)
    tasks = []
    for regime in regimes:
        mine = regime.default_cases
        if named is not None:
            mine = tuple(regime.cases) if named == [ALL] else tuple(name for name in named if name in regime.cases)
        # Together, each measures its own: the layers of `encode` are those of `layers`.
        known = regime.passes if len(regimes) == 1 else regime.default_passes
        which = regime.default_passes if wanted is None else [name for name in wanted if name in known]
        if mine and which:
            tasks.append(Task(regime, mine, [regime.passes[name] for name in which]))
    if not tasks:
        raise CommandError(f"no regime has both a case of {','.join(cases or ())} and a pass of {','.join(passes or ())}")
    return tasks


def _named_cases(regimes: Sequence[Regime], text: str) -> list[str]:
    """Names that regimes have, or ALL alone."""
    names = text.split(",")
    if ALL not in names:
        return _known("--case", "case", [regime.cases for regime in regimes], names)
    if len(set(names)) > 1:
        raise CommandError(f"argument --case: {ALL} must stand alone, got {text}")
    return [ALL]


def _known(option: str, kind: str, tables: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    try:
        return options.names_of(kind, [name for table in tables for name in table])(",".join(names))
    except CommandError as error:
        raise CommandError(f"argument {option}: {error}") from None


def device_and_dtype(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return where and in what to compute; CommandError for a GPU that is not there."""
    found = torch.cuda.is_available()
    if arguments.device == "cuda" and not found:
        raise CommandError("--device cuda: PyTorch finds no GPU here (perceiver-kernels info says more)")
    device = torch.device(arguments.device or ("cuda" if found else "cpu"))
    return device, DTYPES[arguments.dtype] if arguments.dtype else default_dtype(device)


@contextlib.contextmanager
def backend_scope(names: Sequence[str] | None) -> Iterator[None]:
    """Allow these backends in the body, tried in that order; None for what the environment allows.

    Raises:
        CommandError: a name whose backend cannot run, or an environment that leaves none that can.
    """
    known = backends()
    if names is None:
        _check_environment(known)
        yield
        return
    for name in names:
        available, reason = known[name]
        if not available:
            raise CommandError(f"backend {name} is not available: {reason}")
    with use_backend(*names):
        yield


def allowed_backends(names: Sequence[str] | None) -> Sequence[str] | None:
    """Return what --backend restricts to, else what of the environment's backends can run; None where all are allowed."""
    if names is not None or not os.environ.get(ENVIRONMENT_VARIABLE, "").strip():
        return names
    known = backends()
    return [name for name in candidates("attention", None) if known[name][0]]


def _check_environment(known: dict[str, tuple[bool, str]]) -> None:
    try:
        allowed = candidates("attention", None)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not any(known[name][0] for name in allowed):
        reasons = "; ".join(f"{name}: {known[name][1]}" for name in allowed)
        raise CommandError(f"{ENVIRONMENT_VARIABLE} allows no backend that is available: {reasons}")
