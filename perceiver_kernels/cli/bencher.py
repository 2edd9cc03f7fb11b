"""Measures cases into a report: judged against the specification, timed beside peers, printed pass by pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from perceiver_kernels.cli import measure, pass_table
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.gate import Gate, Verdict
from perceiver_kernels.cli.regimes import REGIMES, Regime
from perceiver_kernels.cli.report import Report
from perceiver_kernels.cli.rerun import SECONDS, Conditions
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import COMPILED, GRAPHED, OURS, OWN, Pass, Subject, shape_of
from perceiver_kernels.cli.workload import Workload, chunk_size


@dataclasses.dataclass
class Bench:
    """Measures cases into a report and prints each table as it is done; `failures` says what was wrong.

    Not strict, only a useless result is wrong: for inputs that somebody chose, such as a blank picture, on
    which the textbook can be exact by luck. ``max_inputs`` and ``backends`` are what was asked for: rows tell it in
    their command.
    """

    report: Report
    console: Console
    device: torch.device
    dtype: torch.dtype
    seconds: float = SECONDS
    strict: bool = True
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    max_inputs: int | None = None
    backends: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.conditions = self._conditions(None, compiled=False)
        self.peers: list[Peer] = []

    def _conditions(self, size: int | None, *, compiled: bool) -> Conditions:
        return Conditions(self.device, self.dtype, self.seconds, self.max_inputs, size, self.backends, compiled)

    def measure_ceilings(self) -> None:
        """Measure the product and copy rates that percentages refer to."""
        with self.console.progress("ceilings", 1) as progress:
            progress.advance("a large product and a large copy", 0)
            self.ceilings = measure.ceilings(self.device, self.dtype)
        self.report.set(
            ceilings=self.ceilings,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            time_method=measure.TIME_METHOD[self.device.type],
            memory_method=measure.MEMORY_METHOD[self.device.type],
        )
        self.console.line(
            f"ceilings measured here: {self.ceilings['tflops']:.4g} TFLOP/s in a large matrix product, "
            f"{self.ceilings['gbytes_per_s']:.4g} GB/s in a large copy"
        )

    def case(
        self, regime: Regime, case: Any, passes: list[Pass], peer_names: list[str] | None, *, compiled: bool,
        size: int | None = None,
    ) -> None:  # fmt: skip
        """Measure every pass of one case; one that cannot even be set up here keeps its rows, with the reason.

        Args:
            regime, case: what to measure.
            passes: of the regime.
            peer_names: stock implementations, None for all that the device has.
            compiled: whether all includes what torch.compile makes.
            size: the one of a sweep that the case has, named in each row's command.
        """
        self.conditions = self._conditions(size, compiled=compiled)
        passes = regime.passes_of(case, passes)
        work, failure = self._workload(regime, case)
        if work is None:
            self.console.heading(f"{case.name}: {failure}")
            for each in passes:
                self._failed(regime.name, case, each, failure)
            return
        self.console.heading(work.title)
        if told := regime.cut_of(case, self.device):
            self.console.line(told)
        peers = work.peers(peer_names, compiled=compiled)
        with self.console.progress(case.name, len(passes)) as progress:
            for each in passes:
                progress.advance(each.title, 0)
                try:
                    self.measure_pass(work, each, peers)
                except (RuntimeError, MemoryError) as error:
                    if not measure.is_out_of_memory(error):
                        raise
                    self._failed(regime.name, case, each, measure.OUT_OF_MEMORY)
                progress.advance(each.title)
        del work
        # What is compiled is so as in a process of its own: limits on recompiling count all of a process's models.
        torch.compiler.reset()
        measure.release()
        if regime.has_chunks(case) and size is None and any(each.name.startswith("backward") for each in passes):
            self.chunked_memory(case)

    def _workload(self, regime: Regime, case: Any) -> tuple[Subject | None, str]:
        """The tensors of a case, or why they cannot be here."""
        needed, free = regime.least_bytes(case, "forward", self.dtype.itemsize), measure.free_bytes(self.device)
        if free is not None and needed > 0.8 * free:
            # Asked before, as a CPU's system would kill the process.
            told = f"needs about {format_bytes(needed)}, {format_bytes(free)} are free"
            return None, f"{measure.OUT_OF_MEMORY}: {told}"
        try:
            return regime.workload(case, self.device, self.dtype), ""
        except ImportError as error:
            return None, f"not installed: {error}"
        except (RuntimeError, MemoryError) as error:
            if not measure.is_out_of_memory(error):
                raise
            # The traceback would keep the tensors that did fit.
            error.__traceback__ = None
        measure.release()
        return None, measure.OUT_OF_MEMORY

    def _failed(self, regime: str, case: Any, each: Pass, failure: str) -> None:
        """The row of what could not be measured at all."""
        self.report.add(**self._about(regime, case, each, OURS), failure=failure)
        measure.release()
        self.console.warn(f"{case.name} {each.name}: {failure}")

    def _about(self, regime: str, case: Any, each: Pass, name: str) -> dict[str, Any]:
        """What a row says before anything is known of the result."""
        return {
            "kind": "model" if each.level == "model" else "bench", "regime": regime, "case": case.name,
            "shape": shape_of(case), "pass": each.name, "implementation": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "command": self.conditions.command(REGIMES[regime], case.name, each.name, name, self.peers),
        }  # fmt: skip

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
        self.peers, calls = peers, work.calls(each.name, peers)
        verdicts, failures = self._judge(work, each, calls)
        running = {name: call for name, call in calls.items() if name not in failures}
        timings = measure.time_calls(running, self.device, seconds=self.seconds)
        # A graph's memory is taken once, at its capture; whole models are compiled to graphs.
        counted = {name: call for name, call in running.items() if not name.endswith((GRAPHED, COMPILED))}
        memory = {name: self._memory(work, call) for name, call in counted.items()}
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

    def _memory(self, work: Subject, call: measure.Call) -> int:
        work.forget()
        return measure.peak_extra_bytes(call, self.device)

    def _judge(
        self, work: Subject, each: Pass, calls: dict[str, measure.Call]
    ) -> tuple[dict[str, Verdict], dict[str, str]]:
        """Verdicts of what runs, and why the rest cannot; a wrong result of ours fails the command."""
        failures = {name: reason for name, call in calls.items() if (reason := measure.attempt(call))}
        running = {name: call for name, call in calls.items() if name not in failures}
        verdicts = Gate(work).judge(each.name, work.results(each.name, running))
        for name in OWN:
            if name in verdicts and (verdicts[name].failure if self.strict else verdicts[name].is_wrong):
                failures[name] = f"not timed: {verdicts[name].failure}"
            # What memory does not hold is not wrong.
            if measure.OUT_OF_MEMORY not in failures.get(name, measure.OUT_OF_MEMORY):
                self.failures.append(f"{work.case.name} {each.name} {name}: {failures[name]}")
        return verdicts, failures

    def _row(
        self, work: Subject, each: Pass, name: str, timing: measure.Timing | None, peak: int | None,
        verdict: Verdict | None, failure: str | None, kernels: list[dict[str, Any]] | None,
    ) -> dict[str, Any]:  # fmt: skip
        is_ours = name in OWN
        count, (_, moved) = work.flops(each.name, name), work.least(each.name)
        row = self._about(work.regime, work.case, each, name) | {
            **work.labels(each.name, name), "failure": failure, "flops": count, "bytes": moved,
            "floor_ms": self._floor_ms(work, each.name),
        }  # fmt: skip
        if verdict is not None:
            row |= {"errors": verdict.errors, "eager_errors": verdict.eager_errors}
            # A peer is told off for a useless result only; ours for anything that breaks the rule.
            told = verdict.failure if is_ours or verdict.is_wrong else None
            row |= {"inaccurate": told} if told else {}
        if timing is not None:
            row |= timing.as_dict() | {"peak_extra_bytes": peak, "tflops": count / timing.p50_ms / 1e9}
            row |= {"gbytes_per_s": moved / timing.p50_ms / 1e6, "of_floor": row["floor_ms"] / timing.p50_ms}
        if kernels:
            row["kernels"] = kernels
        return self.report.add(**row)

    def _floor_ms(self, work: Subject, which: str) -> float:
        """The time that nothing beats here: the larger of arithmetic and traffic at the measured ceilings."""
        flops, moved = work.least(which)
        return max(flops / self.ceilings["tflops"] / 1e9, moved / self.ceilings["gbytes_per_s"] / 1e6)
