"""`perceiver-kernels run`: the main job, on a real photograph.

A Perceiver reads the pixels forward and backward; its first cross-attention is compared with the
specification in fp64 and timed beside stock PyTorch's; memory is measured against the number of inputs; JSON
and a PNG are written. On a GPU the model is the paper's ImageNet configuration; on a CPU a small one goes
through the same code.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels.cli import bench, info, measure, options, photograph, plot
from perceiver_kernels.cli.console import Console, format_bytes, format_ms
from perceiver_kernels.cli.memory import sizes_up_to
from perceiver_kernels.cli.report import CommandError, Report, check_apart, check_writable
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import OURS, shape_of
from perceiver_kernels.cli.sweep import Sweep
from perceiver_kernels.cli.workload import PASSES, Workload, describe, widths_of
from perceiver_kernels.models import Perceiver
from perceiver_kernels.testing.cases import EncodeCase

HELP = (
    "the main job: a Perceiver on a real photograph, its error, its time beside stock PyTorch's, its memory"
)
OUTPUT = "runs/latest"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of the model and of the memory sweep."""

    batch: int
    side: int
    bands: int
    model: dict[str, Any]
    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    sweep_peers: tuple[str, ...]
    seconds: float

    @property
    def channels(self) -> int:
        return 3 + self.positions.channels

    @property
    def positions(self) -> pk.FourierPositions:
        return pk.FourierPositions(self.bands, (self.side, self.side))


_SMALL = {
    "num_latents": 64,
    "latent_dim": 128,
    "num_cross_attends": 2,
    "num_blocks": 2,
    "layers_per_block": 2,
}
PRESETS = {
    # The paper's section 4.1: 50,176 pixels x 261 channels, 512 x 1024 latents, 8 cross-attends, 48 latent
    # layers.
    "imagenet": Preset(
        batch=8, side=224, bands=64, model={}, sizes=tuple(4**power for power in range(5, 12)),
        peers=("eager", "math", "flash", "cudnn", "efficient", "cudnn-pad8", "flash-pad8", "efficient-pad8"),
        sweep_peers=("eager", "efficient-pad8"), seconds=0.5,
    ),
    "small": Preset(
        batch=2, side=64, bands=16, model=_SMALL, sizes=tuple(4**power for power in range(5, 11)),
        peers=("eager", "math", "flash"), sweep_peers=("eager", "flash"), seconds=0.5,
    ),
    "tiny": Preset(
        batch=1, side=20, bands=2, model={**_SMALL, "num_latents": 32, "latent_dim": 64}, sizes=(256, 512),
        peers=("eager", "math"), sweep_peers=("eager",), seconds=0.01,
    ),
}  # fmt: skip
DEFAULT_PRESETS = {"cuda": "imagenet", "cpu": "small"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--image", type=options.path, metavar="PATH",
        help="photograph to read (default: those that scikit-image ships)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=options.path, action=options.Once, metavar="DIR", default=OUTPUT,
        help="folder for results.json and plot.png (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--preset", type=options.name_of("preset", PRESETS), metavar="NAME",
        help=f"{', '.join(PRESETS)} (default: {DEFAULT_PRESETS['cuda']} on a GPU, {DEFAULT_PRESETS['cpu']} on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--max-inputs", type=options.count, metavar="M",
        help="leave larger sizes out of the memory sweep (default: no limit)",
    )  # fmt: skip
    bench.add_device_arguments(parser)


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Do the main job; exit code 1 when a result was wrong."""
    device, dtype = bench.device_and_dtype(arguments)
    preset = PRESETS[arguments.preset or DEFAULT_PRESETS[device.type]]
    sizes = sizes_up_to(arguments.max_inputs, preset.sizes)
    photographs = photograph.load(arguments.image)
    numbers, picture = (Path(arguments.output) / name for name in ("results.json", "plot.png"))
    check_writable(picture)
    check_apart({"the picture": picture, "--json": arguments.json})
    with bench.backend_scope(arguments.backend), Report("run", numbers, arguments.json) as report:
        console.line(info.device_line(report.content["environment"]))
        console.heading("Backends")
        info.show_backends(report.content["environment"]["backends"], console)
        # A picture that somebody chose may be blank, and the textbook exact on it by luck.
        job = Job(preset, photographs, device, dtype, report, console, strict=arguments.image is None)
        job.run_model()
        failures = job.compare()
        memory = job.sweep(sizes)
        times = [row for row in report.rows if row["kind"] == "bench"]
        console.heading("Results")
        title = f"{job.names}: {widths_of(job.case)}, {report.content['dtype']}"
        console.line(plot.save(picture, memory=memory, times=times, title=title))
        console.line(f"numbers: {numbers}")
    for failure in failures:
        console.warn(f"WRONG: {failure}")
    return 1 if failures else 0


@dataclasses.dataclass
class Job:
    """The steps of the main job, over one set of photographs."""

    preset: Preset
    photographs: list[tuple[str, Tensor]]
    device: torch.device
    dtype: torch.dtype
    report: Report
    console: Console
    strict: bool = True

    def __post_init__(self) -> None:
        preset = self.preset
        self.names = ", ".join(name for name, _ in self.photographs[: preset.batch])
        model = {"num_latents": 512, "latent_dim": 1024, **preset.model}
        self.case = EncodeCase(
            "photograph", B=preset.batch, M=preset.side**2, C=preset.channels, N=model["num_latents"],
            D=model["latent_dim"], H=1, d_qk=preset.channels, d_v=preset.channels,
        )  # fmt: skip
        dtype = str(self.dtype).removeprefix("torch.")
        self.title = f"{describe(self.case)}, {dtype}, {self.names}"
        self.report.set(photographs=self.names, shape=shape_of(self.case), dtype=dtype)

    def inputs(self) -> pk.InputArray:
        """The photographs as the model reads them: pixels, and positions that are computed while packing."""
        pixels = photograph.crops(self.photographs, self.preset.batch, self.preset.side).to(self.device)
        return pk.InputArray.image(pixels, self.preset.positions, mean=photograph.MEAN, std=photograph.STD)

    def run_model(self) -> None:
        """Build the Perceiver, run it forward and backward, and print what it takes."""
        self.console.heading(f"Perceiver on {self.names}")
        with measure.seeded(0):
            changes = {**self.preset.model, "input_dim": self.preset.channels}
            model = Perceiver.imagenet(device=self.device, dtype=self.dtype, **changes)
        inputs = self.inputs()
        targets = torch.arange(self.preset.batch, device=self.device)
        parameters = list(model.parameters())

        def forward() -> Tensor:
            with torch.no_grad():
                return model(inputs)

        def forward_backward() -> tuple[Tensor, ...]:
            loss = F.cross_entropy(model(inputs).float(), targets)
            return (loss.detach(), *torch.autograd.grad(loss, parameters))

        failure = measure.attempt(forward_backward)
        if failure is not None:
            raise CommandError(f"the model cannot run here: {failure}")
        loss, *gradients = forward_backward()
        squares = sum(gradient.double().square().sum() for gradient in gradients)
        calls = {"forward": forward, "forward + backward": forward_backward}
        with self.console.progress("model", len(calls)) as progress:
            times = measure.time_calls(
                calls, self.device, seconds=self.preset.seconds, min_samples=3, max_samples=20
            )
            peaks = {}
            for name, call in calls.items():
                progress.advance(f"memory, {name}")
                peaks[name] = measure.peak_extra_bytes(call, self.device)
        work = model.flops(self.preset.batch, self.case.M, method="absorbed")
        self.console.line(
            f"{model.num_params():,} parameters; {model.flops(1, self.case.M) / 1e9:.4g} GFLOP an image as "
            f"the paper computes it, {work / self.preset.batch / 1e9:.4g} absorbed; loss {float(loss):.4f}, "
            f"gradient norm {float(squares) ** 0.5:.4g}"
        )
        self.console.table(
            ["pass", "ms", "p20..p80", "images/s", "extra peak memory"],
            [_model_row(name, times[name], peaks[name], self.preset.batch) for name in calls],
        )
        self.report.set(
            model={
                "config": {key: str(value) for key, value in vars(model.config).items()},
                "parameters": model.num_params(), "flops": work, "loss": float(loss),
                "times": {name: timing.as_dict() for name, timing in times.items()},
                "peak_extra_bytes": peaks,
            }
        )  # fmt: skip
        measure.release()

    def compare(self) -> list[str]:
        """Judge and time the first cross-attention on these pixels; return what was wrong."""
        self.console.heading("One cross-attention layer on these inputs, beside stock PyTorch")
        self.console.line(self.title)
        judge = bench.Bench(
            self.report, self.console, self.device, self.dtype, self.preset.seconds, strict=self.strict
        )
        judge.measure_ceilings()
        work = Workload(self.case, self.device, self.dtype, inputs=textbook_inputs(self.inputs(), self.dtype))
        peers = [Peer.parse(name) for name in self.preset.peers]
        with self.console.progress("layer", 2) as progress:
            for name in ("forward", "backward"):
                progress.advance(PASSES[name].title, 0)
                judge.measure_pass(work, PASSES[name], peers)
                progress.advance(PASSES[name].title)
        self._show_errors()
        return judge.failures

    def _show_errors(self) -> None:
        row = next(r for r in self.report.rows if r.get("pass") == "backward" and r["implementation"] == OURS)
        self.console.line(
            "\nerror against the specification in fp64 (relative L2), textbook in the same dtype beside"
        )
        rows = [
            [name, f"{error:.2e}", f"{row['eager_errors'][name]:.2e}"]
            for name, error in row.get("errors", {}).items()
        ]
        self.console.table(["tensor", "ours", "textbook"], rows)

    def sweep(self, sizes: list[int]) -> list[dict[str, Any]]:
        """Measure memory against the number of inputs."""
        self.console.heading("Memory against input size")
        self.console.line(measure.MEMORY_METHOD[self.device.type])
        sweep = Sweep(self.report, self.console, self.device, self.dtype)
        case = dataclasses.replace(self.case, name="sweep", B=1)
        sweep.run(
            case, sizes, ["forward", "backward"], [Peer.parse(name) for name in self.preset.sweep_peers]
        )
        sweep.show()
        return sweep.rows


def textbook_inputs(inputs: pk.InputArray, dtype: torch.dtype) -> Tensor:
    """Return [B, M, C] with the positions written out, as a layer without fused packing needs them."""
    with torch.no_grad():
        packed = pk.pack_inputs(inputs, normalize=False, dtype=dtype, backend="reference")
        return packed.data[..., : packed.channels].contiguous()


def _model_row(name: str, timing: measure.Timing, peak: int, batch: int) -> list[Any]:
    spread = f"{format_ms(timing.p20_ms)}..{format_ms(timing.p80_ms)}"
    return [name, format_ms(timing.p50_ms), spread, f"{1e3 * batch / timing.p50_ms:.1f}", format_bytes(peak)]
