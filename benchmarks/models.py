"""Whole models beside their originals, with the same weights and in the same run.

Perceiver IO beside transformers, eager, compiled and as a CUDA graph; the shape autoencoder's decoder beside the same model
through PyTorch's own attention. A whole model is thousands of launches: where the host is slower at them than the GPU, an eager
call shows the host's time, a graph the GPU's. A result is held against the original in fp32 before it is timed: its error may
be twice that of the original in the dtype that is timed, plus the rounding of the output. Gradients are judged as one vector.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import convert, use_backend
from perceiver_kernels.cli import measure
from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.report import Report
from perceiver_kernels.models import PerceiverIO, VecSetAutoencoder
from perceiver_kernels.testing.accuracy import compare

IMAGENET: dict[str, Any] = {"num_blocks": 8, "num_self_attends_per_block": 6, "num_latents": 512, "d_latents": 1024}
ONE_HEAD: dict[str, Any] = {"num_cross_attention_heads": 1, "cross_attention_shape_for_attention": "kv"}
FLOW: dict[str, Any] = {
    "num_blocks": 1, "num_self_attends_per_block": 24, "num_latents": 2048, "d_latents": 512, "num_self_attention_heads": 16,
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {"num_blocks": 1, "num_self_attends_per_block": 8, "num_latents": 784, "d_latents": 512}
PARTS_OF_A_VIDEO = 128
"""Multimodal outputs are evaluated a part at a time, as the original is: 6,272 pixels, 15 patches of audio and the label."""
COMPILED = ("imagenet-fourier-b8",)
"""Compiling a case takes minutes: forward and training, of both models."""
GRIDS = (129, 257)
PASSES = ("forward", "training")
SHAPES = VecSetAutoencoder.shapenet
SUBJECT, ORIGINAL = "ours", "transformers"


@dataclass(frozen=True)
class ModelCase:
    """One model on one input.

    Args:
        name: of the case.
        original: transformers' class, and its sizes.
        build: our model.
        inputs: float inputs on a CPU, or a mapping of them.
        options: arguments of our call and of theirs, beside the inputs.
        passes: of "forward" and "training" (forward and backward).
        theirs_under_autocast: the original mixes in fp32 tables and cannot be of half width; its weights stay in fp32.
    """

    name: str
    original: tuple[str, dict[str, Any]]
    build: Callable[..., PerceiverIO]
    inputs: Callable[[], Any]
    options: Callable[[], tuple[dict[str, Any], dict[str, Any]]] = lambda: ({}, {})
    passes: tuple[str, ...] = PASSES
    theirs_under_autocast: bool = False


def _images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def _media() -> dict[str, Tensor]:
    return {"image": torch.randn(1, 16, 3, 224, 224), "audio": torch.randn(1, 30_720, 1), "label": torch.rand(1, 700)}


def _part_of_a_video() -> tuple[dict[str, Any], dict[str, Any]]:
    image, audio = 16 * 224 * 224 // PARTS_OF_A_VIDEO, 1920 // PARTS_OF_A_VIDEO
    points = {"image": torch.arange(image), "audio": torch.arange(audio), "label": None}
    return {"points": points}, {"subsampled_output_points": points}


CASES = {
    case.name: case
    for case in (
        ModelCase(
            "imagenet-fourier-b8", ("PerceiverForImageClassificationFourier", {**IMAGENET, **ONE_HEAD, "num_labels": 1000}),
            PerceiverIO.imagenet_fourier, functools.partial(_images, 8),
        ),
        ModelCase(
            "imagenet-fourier-b1", ("PerceiverForImageClassificationFourier", {**IMAGENET, **ONE_HEAD, "num_labels": 1000}),
            PerceiverIO.imagenet_fourier, functools.partial(_images, 1), passes=("forward",),
        ),
        ModelCase(
            "optical-flow", ("PerceiverForOpticalFlow", {**FLOW, **ONE_HEAD}), PerceiverIO.optical_flow,
            lambda: torch.randn(1, 2, 27, 368, 496),
        ),
        ModelCase(
            "multimodal-part", ("PerceiverForMultimodalAutoencoding", {**MULTIMODAL, **ONE_HEAD, "num_labels": 700}),
            PerceiverIO.multimodal, _media, _part_of_a_video, theirs_under_autocast=True,
        ),
    )
}  # fmt: skip


def measure_models(
    report: Report, console: Console, device: torch.device, dtype: torch.dtype, *, compiled: bool, seconds: float,
    out_of_time: Callable[[str], bool] = lambda what: False,
) -> list[str]:  # fmt: skip
    """Judge and time every case.

    Returns:
        What was wrong, one sentence each.
    """
    failures = []
    for case in CASES.values():
        if out_of_time(case.name):
            return failures
        chosen = compiled and case.name in COMPILED
        failures += _measure_case(report, console, case, device, dtype, compiled=chosen, seconds=seconds)
        measure.release()
    for resolution in GRIDS:
        if not out_of_time(f"grid of {resolution}"):
            failures += _measure_grid(report, console, resolution, device, dtype, seconds=seconds)
            measure.release()
    return failures


def _measure_case(
    report: Report, console: Console, case: ModelCase, device: torch.device, dtype: torch.dtype, *, compiled: bool,
    seconds: float,
) -> list[str]:  # fmt: skip
    console.line(f"\n{case.name}")
    theirs, ours = _pair(case, device, torch.float32)
    with measure.seeded(1):
        inputs = _moved(case.inputs(), device, torch.float32)
    our_options, their_options = (_moved(options, device, None) for options in case.options())
    exact = {which: _result(theirs, ours, _call(theirs, inputs, their_options, which)) for which in case.passes}
    ours, our_inputs = ours.to(dtype), _moved(inputs, device, dtype)
    width = dtype if case.theirs_under_autocast else None
    theirs, their_inputs = (theirs, inputs) if width else (theirs.to(dtype), our_inputs)
    failures = []
    for which in case.passes:
        subject = _call(ours, our_inputs, our_options, which)
        peer = _call(theirs, their_inputs, their_options, which, width)
        calls: dict[str, measure.Call] = {SUBJECT: subject, ORIGINAL: peer}
        if device.type == "cuda":
            calls |= {f"{SUBJECT}-graphed": _captured(subject, ours), f"{ORIGINAL}-graphed": _captured(peer, theirs)}
        if compiled:
            calls[f"{SUBJECT}-compiled"] = _call(torch.compile(ours), our_inputs, our_options, which)
            calls[f"{ORIGINAL}-compiled"] = _call(torch.compile(theirs), their_inputs, their_options, which, width)
        stopped = {name: reason for name, call in calls.items() if (reason := measure.attempt(call))}
        running = {name: call for name, call in calls.items() if name not in stopped}
        errors: dict[str, dict[str, Any]] = {name: {} for name in calls}
        if ORIGINAL in running:
            eager = _result(theirs, ours, peer)
            for name in [name for name in running if name.startswith(SUBJECT)]:
                found = _result(None, ours, running[name])
                for what, truth in exact[which].items():
                    judged = compare(found[what], eager[what], truth.double())[0]
                    errors[name][what] = {"error": judged.error, "eager": judged.eager}
                    if not judged.passes:
                        failures.append(f"{case.name} {which} {name} {what}: {judged}")
        failures += [
            f"{case.name} {which} {name}: {reason}" for name, reason in stopped.items() if name in (SUBJECT, ORIGINAL)
        ]
        _record(report, console, case.name, which, running, stopped, errors, device, seconds)
    return failures


def _pair(case: ModelCase, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, PerceiverIO]:
    """The original with random weights, and ours with the same; neither drops anything."""
    import transformers

    name, sizes = case.original
    with measure.seeded(0):
        config = transformers.PerceiverConfig(**sizes, attention_probs_dropout_prob=0.0)
        theirs = getattr(transformers, name)(config).to(device, dtype).eval()
    ours = case.build(like="transformers", device=device, dtype=dtype).eval()
    convert.load(ours, theirs.state_dict(), "transformers")
    return theirs, ours


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(item, device, dtype) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _outputs(model: nn.Module, inputs: Any, options: dict[str, Any]) -> list[Tensor]:
    result = model(inputs, **options)
    result = getattr(result, "logits", result)
    return [result[name] for name in sorted(result)] if isinstance(result, Mapping) else [result]


def _train(model: nn.Module, inputs: Any, options: dict[str, Any]) -> list[Tensor]:
    """Forward, and backward from ones: gradients are left in the parameters."""
    model.zero_grad(set_to_none=True)
    outputs = _outputs(model, inputs, options)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return outputs


def _call(model: Any, inputs: Any, options: dict[str, Any], which: str, width: torch.dtype | None = None) -> measure.Call:
    """A call that returns outputs; of training, gradients are then in the parameters. ``width``: under autocast to it."""

    def call() -> list[Tensor]:
        with contextlib.nullcontext() if width is None else torch.autocast(_device_type(inputs), width):
            if which == "training":
                return _train(model, inputs, options)
            with torch.no_grad():
                return _outputs(model, inputs, options)

    return call


def _device_type(inputs: Any) -> str:
    return next(iter(inputs.values())).device.type if isinstance(inputs, Mapping) else inputs.device.type


def _captured(call: measure.Call, model: nn.Module) -> measure.Call:
    """A call's kernels as a CUDA graph, made at the first use; outputs and gradients are overwritten by every replay."""
    graphs: list[Any] = []

    def replay() -> list[Tensor]:
        if not graphs:
            model.zero_grad(set_to_none=True)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = call()
            graphs.extend((graph, kept, [p.grad for p in model.parameters()]))
        graph, kept, gradients = graphs
        graph.replay()
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        return kept

    return replay


def _result(theirs: nn.Module | None, ours: PerceiverIO, call: measure.Call) -> dict[str, Tensor]:
    """Outputs of a call, and the gradients that it leaves, as vectors; of the original under our names."""
    model: nn.Module = ours if theirs is None else theirs
    model.zero_grad(set_to_none=True)
    out = {"out": torch.cat([output.detach().flatten().clone() for output in call()])}
    if all(p.grad is None for p in model.parameters()):
        return out
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    if theirs is not None:
        state = {name: gradients.get(name, torch.zeros_like(tensor)) for name, tensor in theirs.state_dict().items()}
        gradients = convert.to_ours(convert.rules_of(ours, ORIGINAL), state)
    out["gradients"] = torch.cat([gradients[name].flatten() for name, _ in ours.named_parameters()])
    model.zero_grad(set_to_none=True)
    return out


def _measure_grid(
    report: Report, console: Console, resolution: int, device: torch.device, dtype: torch.dtype, *, seconds: float
) -> list[str]:
    """The field of one shape on a grid of ``resolution``^3."""
    console.line(f"\nshape decoder, {resolution}^3 queries")
    with measure.seeded(0):
        model = SHAPES(device=device, dtype=torch.float32).eval()
        latents = torch.randn(1, model.config.num_latents, model.config.dim, device=device)
        queries = torch.rand(1, 4096, 3, device=device) * 2 - 1
    with torch.no_grad(), use_backend("reference"):
        truth = model.decode(latents, queries).double()
    model, latents = model.to(dtype), latents.to(dtype)

    def through_sdpa() -> Tensor:
        with use_backend("sdpa"):
            return model.decode_grid(latents, resolution)

    with torch.no_grad():
        found = model.decode(latents, queries)
        with use_backend("reference"):
            eager = model.decode(latents, queries)
    judged = compare(found.flatten(), eager.flatten(), truth.flatten())[0]
    errors = {SUBJECT: {"out": {"error": judged.error, "eager": judged.eager}}}
    calls = {SUBJECT: lambda: model.decode_grid(latents, resolution), "sdpa": through_sdpa}
    stopped = {name: reason for name, call in calls.items() if (reason := measure.attempt(call))}
    running = {name: call for name, call in calls.items() if name not in stopped}
    _record(report, console, f"shape-decoder-{resolution}", "forward", running, stopped, errors, device, seconds)
    name = f"shape-decoder-{resolution}"
    return [f"{name}: {judged}"] if not judged.passes else [f"{name}: {stopped[SUBJECT]}"] if SUBJECT in stopped else []


def _record(
    report: Report, console: Console, case: str, which: str, running: dict[str, measure.Call], stopped: dict[str, str],
    errors: dict[str, dict[str, Any]], device: torch.device, seconds: float,
) -> None:  # fmt: skip
    timings = measure.time_calls(running, device, seconds=seconds, max_samples=50)
    for name in (*running, *stopped):
        timing = timings[name].as_dict() if name in timings else {}
        # A graph's memory is taken once, at its capture.
        counted = name in running and not name.endswith("-graphed")
        peak = measure.peak_extra_bytes(running[name], device) if counted else None
        report.add(
            kind="model", case=case, implementation=name, failure=stopped.get(name), peak_extra_bytes=peak,
            errors=errors.get(name, {}), **{"pass": which}, **timing,
        )  # fmt: skip
        told = f"{timing['p50_ms']:9.3f} ms  {(peak or 0) / 2**20:9.1f} MiB" if timing else stopped[name]
        console.line(f"  {which:9} {name:22} {told}")
