"""`perceiver-kernels bench REGIME`: named cases against named stock implementations, correctness first.

For every case and pass the specification is computed in fp64, our result is judged against it, and only a
result that passes is timed; a wrong one ends the command with exit code 1. A peer that cannot run keeps its
row, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from perceiver_kernels.cli import info, measure, options, pass_table
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.gate import Gate, Verdict
from perceiver_kernels.cli.regimes import REGIMES, Regime
from perceiver_kernels.cli.report import CommandError, Report
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import OURS, OWN, Pass, Subject, shape_of
from perceiver_kernels.cli.workload import Workload, chunk_size
from perceiver_kernels.dispatch import BACKENDS, ENVIRONMENT_VARIABLE, backends, candidates, use_backend

HELP = "time named cases against named stock implementations; refuses to time a wrong result"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "what", choices=list(REGIMES), metavar="REGIME", help=_by_regime(lambda regime: regime.meaning)
    )  # fmt: skip
    parser.add_argument(
        "--case", nargs="+", metavar="NAME",
        help=f"named sizes (default: {_by_regime(lambda regime: ' '.join(regime.default_cases))})",
    )  # fmt: skip
    parser.add_argument(
        "--passes", metavar="NAME,...",
        help=f"what to measure (default: {_by_regime(lambda regime: ','.join(regime.passes))})",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=options.peers, metavar="NAME,...",
        help="stock implementations (default: all that the device has; 'none' for none)",
    )  # fmt: skip
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes of stock PyTorch"
    )
    parser.add_argument(
        "--seconds", type=options.seconds, default=Bench.seconds,
        help="sampling time per implementation and pass (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-inputs", type=options.count, metavar="M",
        help="cut cases to M inputs, or queries and keys (default: as many as they have on a GPU; on a CPU "
        f"{_by_regime(lambda regime: str(regime.cpu_inputs))})",
    )  # fmt: skip
    add_device_arguments(parser)


def _by_regime(told: Callable[[Regime], str]) -> str:
    return "; ".join(f"{regime.name}: {told(regime)}" for regime in REGIMES.values())


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say where and in what to compute."""
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--backend", type=options.names_of("backend", BACKENDS), metavar="NAME,...",
        help="allow these backends only, tried in this order (default: all that are available)",
    )  # fmt: skip


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Run the benchmark; exit code 1 when a result of ours was wrong."""
    regime = REGIMES[arguments.what]
    names, passes = chosen(regime, arguments.case, arguments.passes)
    device, dtype = device_and_dtype(arguments)
    cases = [regime.sizes(name, device, arguments.max_inputs) for name in names]
    compiled = device.type == "cuda" and not arguments.no_compile
    with backend_scope(arguments.backend), Report(f"bench {regime.name}", arguments.json) as report:
        bench = Bench(report, console, device, dtype, seconds=arguments.seconds)
        console.line(
            f"{info.device_line(report.content['environment'])}; {str(dtype).removeprefix('torch.')}"
        )
        bench.measure_ceilings()
        for case in cases:
            bench.case(regime, case, passes, arguments.peers, compiled=compiled)
    return 1 if bench.failures else 0


def chosen(
    regime: Regime, cases: Sequence[str] | None, passes: str | None
) -> tuple[Sequence[str], list[Pass]]:
    """Return the names of the cases and the passes asked for, or the regime's own; which there are depends on it."""

    def read(option: str, kind: str, known: Mapping[str, Any], text: str) -> list[str]:
        try:
            return options.names_of(kind, known)(text)
        except CommandError as error:
            raise CommandError(f"argument {option}: {error}") from None

    names = regime.default_cases
    if cases is not None:
        names = tuple(name for text in cases for name in read("--case", "case", regime.cases, text))
    wanted = list(regime.passes) if passes is None else read("--passes", "pass", regime.passes, passes)
    return names, [regime.passes[name] for name in wanted]


def device_and_dtype(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return where and in what to compute; CommandError for a GPU that is not there."""
    found = torch.cuda.is_available()
    if arguments.device == "cuda" and not found:
        raise CommandError("--device cuda: PyTorch finds no GPU here (perceiver-kernels info says more)")
    device = torch.device(arguments.device or ("cuda" if found else "cpu"))
    return device, DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]


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


def _check_environment(known: dict[str, tuple[bool, str]]) -> None:
    try:
        allowed = candidates("attention", None)
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not any(known[name][0] for name in allowed):
        reasons = "; ".join(f"{name}: {known[name][1]}" for name in allowed)
        raise CommandError(f"{ENVIRONMENT_VARIABLE} allows no backend that is available: {reasons}")


@dataclasses.dataclass
class Bench:
    """Measures cases into a report and prints each table as it is done; `failures` says what was wrong.

    Not strict, only a useless result is wrong: for inputs that somebody chose, such as a blank picture, on
    which the textbook can be exact by luck.
    """

    report: Report
    console: Console
    device: torch.device
    dtype: torch.dtype
    seconds: float = 0.3
    strict: bool = True
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def measure_ceilings(self) -> None:
        """Measure the product and copy rates that percentages refer to."""
        self.ceilings = measure.ceilings(self.device, self.dtype)
        self.report.set(
            ceilings=self.ceilings,
            dtype=str(self.dtype).removeprefix("torch."),
            time_method=measure.TIME_METHOD[self.device.type],
            memory_method=measure.MEMORY_METHOD[self.device.type],
        )
        self.console.line(
            f"ceilings measured here: {self.ceilings['tflops']:.4g} TFLOP/s in a large matrix product, "
            f"{self.ceilings['gbytes_per_s']:.4g} GB/s in a large copy"
        )

    def case(
        self, regime: Regime, case: Any, passes: list[Pass], peer_names: list[str] | None, *, compiled: bool
    ) -> None:
        """Measure every pass of one case."""
        work = regime.workload(case, self.device, self.dtype)
        self.console.heading(work.title)
        peers = work.peers(peer_names, compiled=compiled)
        with self.console.progress(case.name, len(passes)) as progress:
            for each in passes:
                progress.advance(each.title, 0)
                self.measure_pass(work, each, peers)
                progress.advance(each.title)
        del work
        measure.release()
        if regime.chunks and any(each.name.startswith("backward") for each in passes):
            self.chunked_memory(case)

    def chunked_memory(self, case: Any) -> None:
        """Measure what the chunked layer takes at the case's M and at ten times as many inputs."""
        peaks = {}
        chunk = min(chunk_size(case.B), case.M)
        for M in (case.M, 10 * case.M):
            work = Workload(dataclasses.replace(case, M=M), self.device, self.dtype, chunk=chunk)
            call = work.chunked("backward")
            failure = measure.attempt(call)
            peaks[M] = None if failure else measure.peak_extra_bytes(call, self.device)
            self.report.add(
                kind="chunked-memory", case=case.name, M=M, peak_extra_bytes=peaks[M], failure=failure
            )
            del call, work
            measure.release()
        told = ", ".join(f"{format_bytes(peak)} at {M:,} inputs" for M, peak in peaks.items())
        self.console.line(f"\nchunked, forward + backward, extra peak memory: {told}")

    def judge_pass(self, work: Subject, each: Pass) -> None:
        """Judge our result of one pass, without timing it."""
        verdicts, failures = self._judge(work, each, {OURS: work.ours(each.name)})
        errors = verdicts[OURS].errors if OURS in verdicts else {}
        eager_errors = verdicts[OURS].eager_errors if OURS in verdicts else {}
        self.report.add(
            kind="judged", case=work.case.name, shape=shape_of(work.case), **{"pass": each.name},
            errors=errors, eager_errors=eager_errors, failure=failures.get(OURS),
        )  # fmt: skip
        told = ", ".join(f"{name} {error:.1e} ({eager_errors[name]:.1e})" for name, error in errors.items())
        self.console.line(f"{work.case.name} {each.name}: {failures.get(OURS) or told}")

    def measure_pass(self, work: Subject, each: Pass, peers: list[Peer]) -> None:
        """Judge, time and print one pass of one workload."""
        calls = work.calls(each.name, peers)
        verdicts, failures = self._judge(work, each, calls)
        running = {name: call for name, call in calls.items() if name not in failures}
        timings = measure.time_calls(running, self.device, seconds=self.seconds)
        memory = {name: measure.peak_extra_bytes(call, self.device) for name, call in running.items()}
        kernels = {
            name: measure.kernel_times(call, self.device) for name, call in running.items() if name in OWN
        }
        rows = [
            self._row(
                work, each, name, timings.get(name), memory.get(name), verdicts.get(name), failures.get(name),
                kernels.get(name),
            )
            for name in calls
        ]  # fmt: skip
        pass_table.show(self.console, each.title, rows)

    def _judge(
        self, work: Subject, each: Pass, calls: dict[str, measure.Call]
    ) -> tuple[dict[str, Verdict], dict[str, str]]:
        """Verdicts of what runs, and why the rest cannot; a wrong result of ours fails the command."""
        failures = {name: reason for name, call in calls.items() if (reason := measure.attempt(call))}
        running = {name: call for name, call in calls.items() if name not in failures}
        verdicts = Gate(work).judge(each.name, running)
        for name in OWN:
            if name in verdicts and (verdicts[name].failure if self.strict else verdicts[name].is_wrong):
                failures[name] = f"not timed: {verdicts[name].failure}"
            if name in failures:
                self.failures.append(f"{work.case.name} {each.name} {name}: {failures[name]}")
        return verdicts, failures

    def _row(
        self, work: Subject, each: Pass, name: str, timing: measure.Timing | None, peak: int | None,
        verdict: Verdict | None, failure: str | None, kernels: list[dict[str, Any]] | None,
    ) -> dict[str, Any]:  # fmt: skip
        case, is_ours = work.case, name in OWN
        count = work.flops(each.name, name)
        row: dict[str, Any] = {
            "kind": "bench", "case": case.name, "shape": shape_of(case), "pass": each.name,
            "implementation": name, **work.labels(each.name, name), "failure": failure, "flops": count,
            "floor_ms": self._floor_ms(work, each.name),
            "command": f"perceiver-kernels bench {work.regime} --case {case.name} --passes {each.name}"
            + ("" if is_ours else f" --peers {name}"),
        }  # fmt: skip
        if verdict is not None:
            row |= {"errors": verdict.errors, "eager_errors": verdict.eager_errors}
            # A peer is told off for a useless result only; ours for anything that breaks the rule.
            told = verdict.failure if is_ours or verdict.is_wrong else None
            row |= {"inaccurate": told} if told else {}
        if timing is not None:
            row |= timing.as_dict() | {"peak_extra_bytes": peak, "tflops": count / timing.p50_ms / 1e9}
            row["of_floor"] = row["floor_ms"] / timing.p50_ms
        if kernels:
            row["kernels"] = kernels
        return self.report.add(**row)

    def _floor_ms(self, work: Subject, which: str) -> float:
        """The time that nothing beats here: the larger of arithmetic and traffic at the measured ceilings."""
        flops, moved = work.least(which)
        return max(flops / self.ceilings["tflops"] / 1e9, moved / self.ceilings["gbytes_per_s"] / 1e6)
