"""The sweep of `memory`: peak and kept bytes of layers against the number of inputs, beside their closed forms."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.cli import fake, measure, originals
from perceiver_kernels.cli.console import Console, format_bytes
from perceiver_kernels.cli.report import Report
from perceiver_kernels.cli.saved import saved_bytes
from perceiver_kernels.cli.stock import Peer, compiled
from perceiver_kernels.cli.subject import CHUNKED, OURS, shape_of, under
from perceiver_kernels.cli.workload import Workload, chunk_size
from perceiver_kernels.device import device_facts
from perceiver_kernels.plan.footprint import Footprint, eager_footprint, layer_footprint

PASSES = {"forward": "forward", "backward": "forward + backward"}
KERNELS = ("cuda", "triton", fake.BACKEND)
CPU_CHUNK = 4096
"""Tokens per chunk on a CPU, whose cases are small: a default sweep is to have several chunks."""
Layer = Callable[[], tuple[Any, Peer | None]]


class Sweep:
    """Measures memory against M into a report.

    Args:
        report, console: where rows and tables go.
        device, dtype: where and in what the layers are; fake tensors are on the CPU.
        predict: measure fake tensors instead of allocating any.
    """

    def __init__(
        self, report: Report, console: Console, device: torch.device, dtype: torch.dtype, *, predict: bool = False
    ) -> None:
        self.report, self.console, self.device, self.dtype = report, console, device, dtype
        self.predict = predict
        self.rows: list[dict[str, Any]] = []

    def run(
        self, case: Any, sizes: Sequence[int], passes: Sequence[str], peers: Sequence[Peer],
        libraries: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Measure every implementation at every size; one that failed is not tried at larger sizes, and has no rows there.

        Args:
            case: an encode case, whose M is replaced.
            sizes: numbers of inputs, the smallest first.
            passes: of PASSES.
            peers: stock implementations.
            libraries: names of `originals`.
        """
        ended: set[tuple[str, str]] = set()
        steps = len(sizes) * len(passes) * (2 + len(peers) + len(libraries))
        chunk = self.chunk(case)
        with self.console.progress("memory", steps) as progress, self._place():
            for size in sizes:
                work = self._workload(dataclasses.replace(case, M=size), chunk)
                layers = self._layers(work, peers, libraries)
                for which in passes:
                    for name, build in layers.items():
                        progress.advance(f"{size:,} inputs, {which}, {name}")
                        if (which, name) in ended:
                            continue
                        if self._measure(work, which, name, build)["failure"]:
                            ended.add((which, name))
                del work, layers
                self._release()

    def chunk(self, case: Any) -> int:
        """Return the tokens that are packed and read at a time, whatever else is swept; fewer are one chunk."""
        size = chunk_size(case.B)
        return size if self.predict or self.device.type == "cuda" else min(size, CPU_CHUNK)

    def _place(self) -> contextlib.AbstractContextManager[None]:
        return fake.tensors() if self.predict else measure.heap_set_aside()

    def _release(self) -> None:
        """Of fake tensors there is nothing to return."""
        if not self.predict:
            measure.release()

    def _workload(self, case: Any, chunk: int) -> Workload:
        return (fake.FakeWorkload if self.predict else Workload)(case, self.device, self.dtype, chunk=chunk)

    def _layers(self, work: Workload, peers: Sequence[Peer], libraries: Sequence[str]) -> dict[str, Layer]:
        def stock(peer: Peer) -> tuple[Any, Peer]:
            layer = work.stock_layer(peer)
            return (compiled(layer) if peer.compiled else layer), peer

        return {
            OURS: lambda: (work.layer, None),
            CHUNKED: lambda: (work.chunked_layer, None),
            **{peer.name: (lambda peer=peer: stock(peer)) for peer in peers},
            **{name: (lambda name=name: (self._original(work, name), None)) for name in libraries},
        }

    def _original(self, work: Workload, name: str) -> Any:
        return originals.layer(name, work.case, work.layer, self.device, self.dtype)

    def _measure(self, work: Workload, which: str, name: str, build: Layer) -> dict[str, Any]:
        method, backend = work.choice(which) if name in (OURS, CHUNKED) else ("projected", "stock")
        expected = predicted(work, which, name, method, backend)
        failure = self._refusal(work, which, name, expected)
        taken: dict[str, int] = {}
        failure = failure or measure.attempt(lambda: taken.update(self._bytes(work, which, build)))
        if failure:
            taken.clear()
        self._release()
        case = work.case
        row: dict[str, Any] = {
            "kind": "memory", "case": case.name, "shape": shape_of(case), "M": case.M, "pass": which,
            "implementation": name, "peak_extra_bytes": taken.get("peak"), "saved_bytes": taken.get("saved"),
            "failure": failure, "backend": backend, "predicted_bytes": expected and expected.peak,
            "predicted_saved_bytes": expected.saved if expected and which == "backward" else None,
            "dtype": str(self.dtype).removeprefix("torch."), "predicted": self.predict,
        }  # fmt: skip
        if name == CHUNKED:
            row["chunk"] = work.chunk
        self.report.add(**row)
        self.rows.append(row)
        return row

    def _bytes(self, work: Workload, which: str, build: Layer) -> dict[str, int]:
        layer, peer = build()
        call = work.layer_call(which, layer, work.inputs, peer)
        taken: dict[str, int] = {}
        if which == "backward":
            latents = work.latents.detach().requires_grad_()
            given: list[Tensor] = [latents, work.inputs, *layer.parameters(), *layer.buffers()]
            taken["saved"] = saved_bytes(under(peer, lambda: layer(latents, work.inputs)), given)
        if self.predict:
            return {**taken, "peak": fake.peak_extra_bytes(call)}
        if self.device.type == "cuda":
            # The first call on a GPU compiles and allocates workspaces; on a CPU there is nothing to warm up.
            call()
        return {**taken, "peak": measure.peak_extra_bytes(call, self.device)}

    def _refusal(self, work: Workload, which: str, name: str, expected: Footprint | None) -> str | None:
        """On a CPU the system would kill the process: a need beyond free memory is not tried."""
        if self.predict or self.device.type == "cuda":
            return None
        needed = expected.peak if expected else least_need(work.case, which, name, self.dtype.itemsize)
        free = measure.free_bytes(self.device)
        if free is None or needed < 0.8 * free:
            return None
        return f"out of memory: needs about {format_bytes(needed)}, {format_bytes(free)} are free"

    def show(self) -> None:
        """Print peak against M for every pass and what a backward is kept, then slopes beside those of the closed forms."""
        label = "predicted with fake tensors" if self.predict else "measured"
        for which in dict.fromkeys(row["pass"] for row in self.rows):
            rows = [row for row in self.rows if row["pass"] == which]
            self.console.line(f"\nextra peak memory, {PASSES[which]}, {label}")
            self._table(rows, "peak_extra_bytes", "predicted_bytes")
            self._show_failures(rows)
            for name in dict.fromkeys(row["implementation"] for row in rows if row["predicted_bytes"]):
                self.console.line(slope_sentence(rows, name))
            if which == "backward":
                self.console.line(f"\nkept between forward and backward, {label}")
                self._table(rows, "saved_bytes", "predicted_saved_bytes")

    def _table(self, rows: list[dict[str, Any]], measured: str, closed: str) -> None:
        cells = {(row["M"], row["implementation"]): row for row in rows}
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        formed = [name for name in names if any(row[closed] for row in rows if row["implementation"] == name)]
        titles = ["inputs", *names, *(f"{name}, closed form" for name in formed)]
        table = [
            [f"{size:,}", *(_cell(cells.get((size, name)), measured) for name in names)]
            + [format_bytes(cells[size, name][closed]) if (size, name) in cells else "-" for name in formed]
            for size in dict.fromkeys(row["M"] for row in rows)
        ]
        self.console.table(titles, table, spare=list(reversed(titles[3:])))

    def _show_failures(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["failure"]:
                self.console.line(f"  {row['implementation']} at {row['M']:,} inputs: {row['failure']}")


def predicted(work: Workload, which: str, name: str, method: str, backend: str) -> Footprint | None:
    """Return the closed form of an implementation's memory; None for what has none: a peer's kernels, a projected layer.

    Args:
        work: sizes, device and dtype.
        which: of PASSES.
        name: of the implementation.
        method, backend: of ours.
    """
    case, device = work.case, work.device
    problem = fake.layer_problem(work, which)
    if name == "eager":
        return eager_footprint(problem, case.D)
    composed = backend == "sdpa" and device.type == "cpu"
    absorbed = name == CHUNKED or (name == OURS and method == "absorbed")
    if not absorbed or not (composed or backend in KERNELS):
        return None
    facts = device_facts(device) if device.type == "cuda" else None
    chunk = work.chunk if name == CHUNKED else None
    return layer_footprint(problem, case.D, chunk_size=chunk, device=facts, composed=composed)


def least_need(case: Any, which: str, name: str, itemsize: int) -> int:
    """Return a lower bound of what an implementation without a closed form allocates, in bytes."""
    tokens = case.B * case.M
    if name == CHUNKED:
        return 0
    if name == OURS:
        return tokens * case.C * itemsize
    keys_and_values = tokens * (case.C + case.H * (case.d_qk + case.d_v)) * itemsize
    written_out = "eager" in name or "math" in name or name in originals.PACKAGES
    scores = case.H * case.N * tokens * itemsize if written_out else 0
    return (keys_and_values + 2 * scores) * (2 if which == "backward" else 1)


def slope(rows: list[dict[str, Any]], name: str, field: str = "peak_extra_bytes") -> float | None:
    """Return the extra bytes per input token between the two largest sizes that ran; None where there are no two."""
    points = [
        (row["shape"]["B"] * row["M"], row[field])
        for row in rows
        if row["implementation"] == name and row["peak_extra_bytes"] is not None
    ][-2:]
    if len(points) < 2 or None in (points[0][1], points[1][1]):
        return None
    (few, less), (many, more) = points
    return (more - less) / (many - few)


def slope_sentence(rows: list[dict[str, Any]], name: str) -> str:
    """Return the slope beside that of the closed form."""
    found, expected = slope(rows, name), slope(rows, name, "predicted_bytes")
    if found is None or expected is None:
        return f"  {name}: fewer than two sizes, no slope"
    return f"  {name}: {found:.1f} extra bytes per input token, closed form {expected:.1f}"


def _cell(row: dict[str, Any] | None, field: str) -> str:
    if row is None:
        return "-"
    if row["failure"]:
        return "out of memory" if row["failure"].startswith("out of memory") else "cannot"
    return format_bytes(row[field])
