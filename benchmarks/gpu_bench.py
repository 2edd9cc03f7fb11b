"""Everything that is claimed about one GPU, measured in one call: `make gpu-bench` runs this file.

Parts, in this order; each writes <output>/<part>.json after every row:

- correctness: the self-test of every backend; then every gradient of full-size cases against fp64
- kernels: pack, shared-KV attention forward, backward to queries and to inputs, beside stock attention
- layers: LayerNorm, projections, attention, output projection, beside every stock implementation
- memory: bytes at the peak and kept for the backward against M, until stock PyTorch runs out of memory
- sizes: whole layers against M, one element of the batch, up to 8 million inputs
- ten-million: 10,485,760 inputs x 261 channels forward and backward, packed and chunked
- hundred-million: a photograph of 10,000 x 10,000 pixels in host memory, chunked, forward and backward
- models: whole models beside their originals, forward and training step, eager, compiled and as CUDA graphs
- grids: models that are asked at every point of a dense grid
- relatives: Perceiver AR, RIN, resamplers and the Set Transformer, beside themselves through PyTorch's attention
- replaced, replaced-layers: models and layers of other libraries before and after replace_attention
- decode, process, encode-kv: attention over given keys and values, forward and backward, beside stock attention

A part that would start after the time budget is skipped, and says so. Exit code 1 when a result was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import large  # noqa: E402
import tables  # noqa: E402

from perceiver_kernels.cli import bench, check, measure, memory, options  # noqa: E402
from perceiver_kernels.cli.console import Console  # noqa: E402
from perceiver_kernels.cli.models import GridCase, ModelCase, SameCase  # noqa: E402
from perceiver_kernels.cli.regimes import REGIMES  # noqa: E402
from perceiver_kernels.cli.report import Report  # noqa: E402
from perceiver_kernels.cli.stock import ATTENTION_PEERS  # noqa: E402
from perceiver_kernels.cli.subject import Pass  # noqa: E402
from perceiver_kernels.cli.workload import PASSES, Workload  # noqa: E402

KERNEL_CASES = ("imagenet", "longctx", "flow", "imagenet-learned", "multimodal", "c128", "c64")
JUDGED_CASES = ("imagenet", "flow", "multimodal")
COMPILED_CASES = ("imagenet", "resampler")
"""Compiling a case takes a minute; these two are where torch.compile was the best that stock PyTorch does."""
ATTENTION_REGIMES = ("decode", "process", "encode-kv")
"""Each a part of its name."""
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "models": ("models", lambda case: isinstance(case, ModelCase)),
    "grids": ("models", lambda case: isinstance(case, GridCase)),
    "relatives": ("models", lambda case: isinstance(case, SameCase)),
    "replaced": ("replaced", lambda case: not case.is_layer),
    "replaced-layers": ("replaced", lambda case: case.is_layer),
}
"""Parts that measure one kind of a regime's cases: all kinds together take longer than one call may."""
KERNEL_PEERS = ["eager", "efficient", "cudnn"]
PHOTOGRAPH_SIDE = 10_000
TEN_MILLION = 10 * 2**20
LAYER_SIZES = (*(4**power for power in range(5, 12)), 2**23)
"""Up to what a GPU also holds in fp64, which results are compared with."""
SIZES_PASSES = ("forward", "backward", "backward-inputs")
SIZES_PEERS = ["eager", "math", "efficient-pad8", "transformers", "perceiver-pytorch"]
"""What runs at 261 channels."""


@dataclasses.dataclass
class Context:
    """What every part needs."""

    output: Path
    console: Console
    device: torch.device
    dtype: torch.dtype
    deadline: float
    cases: Sequence[str] | None
    peers: list[str] | None
    compiled: bool
    seconds: float
    failures: list[str] = dataclasses.field(default_factory=list)

    def report(self, part: str) -> Report:
        return Report(part, self.output / f"{part}.json")

    def chosen(self, names: tuple[str, ...], regime: str = "encode") -> list[Any]:
        cases = REGIMES[regime].cases
        return [cases[name] for name in names if self.cases is None or name in self.cases]

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is used up; says so."""
        if time.monotonic() < self.deadline:
            return False
        self.console.warn(f"skipped for lack of time: {what}")
        return True


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts and print the summary last."""
    arguments = _arguments(argv)
    if not torch.cuda.is_available():
        print("gpu_bench: PyTorch finds no GPU here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    output = Path(arguments.output or _folder(torch.cuda.get_device_name()))
    context = Context(
        output, Console(sys.stdout, plain=True), torch.device("cuda"), torch.bfloat16, time.monotonic() + arguments.budget,
        arguments.cases, arguments.peers, not arguments.no_compile, arguments.seconds,
    )  # fmt: skip
    for part in arguments.parts:
        if context.out_of_time(part):
            continue
        started = time.monotonic()
        context.console.heading(part)
        try:
            PARTS[part](context)
        except Exception as error:
            # One part's defect must not cost the others their turn on the GPU.
            traceback.print_exc()
            context.failures.append(f"{part}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        measure.release()
        context.console.line(f"[{part}: {time.monotonic() - started:.0f} s]")
    context.console.heading("summary")
    for line in tables.summary(tables.load(context.output)):
        context.console.line(line)
    for failure in context.failures:
        context.console.warn(f"WRONG: {failure}")
    return 1 if context.failures else 0


def _folder(gpu: str) -> Path:
    """Where results of a GPU lie: "NVIDIA H100 80GB HBM3" in results/h100."""
    known = [name for name in tables.GPUS if name.upper() in gpu]
    return tables.RESULTS / (known[0] if known else gpu.replace(" ", "-").lower())


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure everything that is claimed about one GPU.")
    parser.add_argument(
        "--parts", type=options.names, action=options.Merged, default=list(PARTS), help=f"of {','.join(PARTS)}"
    )
    parser.add_argument("--cases", type=options.names, action=options.Merged, help="only these cases")
    parser.add_argument(
        "--peers", type=options.peers, action=options.Merged, help="only these stock implementations ('none')"
    )
    parser.add_argument(
        "--output", help="folder for the JSON files (default: benchmarks/results, there the one named for this GPU)"
    )
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds after which no part or case starts"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="sampling time per implementation and pass"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile of the stock layer"
    )
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    known = {name for regime in REGIMES.values() for name in regime.cases}
    unknown += [case for case in arguments.cases or () if case not in known]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return arguments


def correctness(context: Context) -> None:
    """Self-test of every backend, then full-size gradients against fp64."""
    report = context.report("correctness")
    context.failures += check.run(report, context.console, context.device)
    judge = bench.Bench(report, context.console, context.device, context.dtype)
    for case in context.chosen(JUDGED_CASES):
        if context.out_of_time(case.name):
            return
        work = Workload(case, context.device, context.dtype)
        for name in ("pack", "attend", "dq", "dx", "backward-inputs"):
            judge.judge_pass(work, PASSES[name])
        del work
        measure.release()
    context.failures += judge.failures


def kernels(context: Context) -> None:
    """The kernels by themselves."""
    passes = [each for each in PASSES.values() if each.level == "kernel"]
    peers = KERNEL_PEERS if context.peers is None else context.peers
    _timed(context, "kernels", "encode", KERNEL_CASES, passes, peers, COMPILED_CASES)


def layers(context: Context) -> None:
    """The whole layer."""
    regime = REGIMES["layers"]
    _timed(context, "layers", "layers", regime.default_cases, list(regime.passes.values()), context.peers, COMPILED_CASES)


def attention_regime(context: Context, name: str) -> None:
    """Attention over given keys and values: the part has the regime's name."""
    peers = context.peers
    if peers is None:
        # Compiling softmax(q k^T) v takes long for each case, and wins none.
        peers = [peer for peer in ATTENTION_PEERS if not peer.startswith("compiled") and (context.compiled or peer != "flex")]
    _whole(context, name, name, lambda case: True, peers)


def cases_of_a_kind(context: Context, part: str) -> None:
    """One kind of whole models, or of what is replaced."""
    regime, belongs = KINDS[part]
    # Their peers are originals of their own: of attention's, only that there are none counts.
    _whole(context, part, regime, belongs, None if context.peers else context.peers)


def _whole(context: Context, part: str, name: str, belongs: Callable[[Any], bool], peers: list[str] | None) -> None:
    """Every pass of a regime's cases."""
    regime = REGIMES[name]
    # Others than the default cases are measured where they are named.
    named = regime.default_cases if context.cases is None else tuple(regime.cases)
    cases = tuple(each for each in named if belongs(regime.cases[each]))
    _timed(context, part, name, cases, list(regime.passes.values()), peers, cases)


def _timed(
    context: Context, part: str, regime: str, names: tuple[str, ...], passes: list[Pass],
    peers: list[str] | None, compiled: tuple[str, ...],
) -> None:  # fmt: skip
    judge = _judge(context, part)
    for case in context.chosen(names, regime):
        if context.out_of_time(f"{part} of {case.name}"):
            break
        judge.case(
            REGIMES[regime], case, passes, peers, compiled=context.compiled and case.name in compiled
        )
    context.failures += judge.failures


def _judge(context: Context, part: str) -> bench.Bench:
    """What measures into the report of a part; the GPU's ceilings are measured first."""
    judge = bench.Bench(context.report(part), context.console, context.device, context.dtype, seconds=context.seconds)
    judge.measure_ceilings()
    return judge


def memory_against_inputs(context: Context) -> None:
    """Bytes against M at ImageNet's channels and latents."""
    report = context.report("memory")
    sweep = memory.Sweep(report, context.console, context.device, context.dtype)
    sizes = memory.default_sizes(memory.GPU_CASE, context.device, context.dtype, predict=False)
    memory.run(sweep, memory.GPU_CASE, sizes, names=context.peers)


def layers_against_inputs(context: Context) -> None:
    """Layers against M at ImageNet's channels and latents."""
    judge = _judge(context, "sizes")
    regime, peers = REGIMES["layers"], SIZES_PEERS if context.peers is None else context.peers
    passes = [regime.passes[name] for name in SIZES_PASSES]
    for M in LAYER_SIZES:
        if context.out_of_time(f"layers at {M} inputs"):
            break
        case = regime.sizes(memory.GPU_CASE.name, context.device, None, M)
        judge.case(regime, case, passes, peers, compiled=False, size=M)
    context.failures += judge.failures


def ten_million(context: Context) -> None:
    """10,485,760 inputs x 261 channels, resident on the GPU."""
    judge = _judge(context, "ten-million")
    case = dataclasses.replace(REGIMES["encode"].cases["imagenet"], name="ten-million", B=1, M=TEN_MILLION)
    passes = [PASSES[name] for name in ("forward", "backward", "backward-inputs")]
    work = Workload(case, context.device, context.dtype)
    for each in passes:
        if not context.out_of_time(each.title):
            judge.measure_pass(work, each, [])
    context.failures += judge.failures


def hundred_million(context: Context) -> None:
    """100,000,000 pixels in host memory."""
    report = context.report("hundred-million")
    context.failures += large.measure_photograph(
        report, context.console, context.device, side=PHOTOGRAPH_SIDE
    )


PARTS: dict[str, Callable[[Context], None]] = {
    "correctness": correctness,
    "kernels": kernels,
    "layers": layers,
    "memory": memory_against_inputs,
    "sizes": layers_against_inputs,
    "ten-million": ten_million,
    "hundred-million": hundred_million,
    **{part: functools.partial(cases_of_a_kind, part=part) for part in KINDS},
    **{name: functools.partial(attention_regime, name=name) for name in ATTENTION_REGIMES},
}

if __name__ == "__main__":
    sys.exit(main())
