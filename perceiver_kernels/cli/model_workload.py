"""A whole model as something to call, beside its original with the same weights and in the same run.

A whole model is thousands of launches: where the host is slower at them than the GPU, an eager call shows the host's time, a
CUDA graph the GPU's, so both are measured. Compiled models are so with mode "reduce-overhead", which makes CUDA graphs of
what it can. A result is held against the original in the next wider dtype before it is timed:
its error may be twice that of the original in the dtype that is timed, plus the rounding of the output, in the L2 norm.
Gradients are judged as one vector.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.cli.measure import Call, seeded
from perceiver_kernels.cli.models import ModelCase
from perceiver_kernels.cli.stock import Peer, compiled
from perceiver_kernels.cli.subject import COMPILED, GRAPHED, OURS, Pass, quiet
from perceiver_kernels.counting import summary
from perceiver_kernels.models import PerceiverIO

MODEL_PASSES = {
    each.name: each
    for each in (
        Pass("forward", "model", "whole model, forward"),
        Pass("training", "model", "whole model, forward + backward"),
    )
}
ORIGINAL = "transformers"
"""The peer of a published model."""
POSITIONS = 16.0
"""Times the fp32 floor of the accuracy rule: the original makes Fourier features in fp32 whatever its dtype, and the sines of
arguments up to 350 differ by the arguments' rounding; 4e-6 between the two models in fp64."""


class WholeModel:
    """What all kinds share: a `Subject` whose calls are those of whole models, beside one original."""

    regime, norms = "models", 1
    case: Any
    device: torch.device
    dtype: torch.dtype
    original: str

    @property
    def title(self) -> str:
        return self.case.title

    def peers(self, names: Iterable[str] | None, *, compiled: bool) -> list[Peer]:
        if names is not None:
            return [Peer.parse(name) for name in names]
        with_compiled = compiled and getattr(self.case, "compiles", False)
        return [Peer(self.original), *([Peer(self.original, compiled=True)] if with_compiled else [])]

    def names(self, which: str) -> list[str]:
        """Return the names of what is judged."""
        return ["out"] if which == "forward" else ["out", "gradients"]

    def terms(self, which: str) -> Mapping[str, Tensor]:
        """Return none: these results are judged as they are."""
        return {}

    def forget(self) -> None:
        """Take the gradients from every parameter: which of them are a graph's, and stay, depends on what ran last."""
        for model in vars(self).values():
            if isinstance(model, nn.Module):
                model.zero_grad(set_to_none=True)

    def labels(self, which: str, implementation: str) -> dict[str, str]:
        """Return whose model it is; ours takes several backends."""
        return {} if implementation.startswith(OURS) else {"backend": "stock"}

    def _refused(self, peer: Peer) -> Call:
        def call() -> None:
            raise ValueError(f"{peer.name} has no such model: {self.case.name} is measured beside {self.original}")

        return call

    def _compiled(self, model: nn.Module) -> Any:
        return compiled(model, mode="reduce-overhead")

    def _with_graph(self, name: str, call: Call, model: nn.Module) -> dict[str, Call]:
        graph = {name + GRAPHED: captured(call, model)} if self.device.type == "cuda" else {}
        return {name: call, **graph}


class ModelWorkload(WholeModel):
    """A published model of ours and transformers', with one set of random weights; neither drops anything.

    Args:
        case, device, dtype: as in `Subject`.

    Raises:
        ImportError: transformers is not installed.
    """

    original = ORIGINAL

    def __init__(self, case: ModelCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        wider = torch.float64 if dtype == torch.float32 else torch.float32
        self.exact, self.ours_model = _pair(case, device, wider)
        with seeded(1):
            self.exact_inputs = moved_to(case.inputs(), device, wider)
        self.our_options, self.their_options = (moved_to(options, device, None) for options in case.options())
        self.ours_model.to(dtype)
        self.our_inputs = moved_to(self.exact_inputs, device, dtype)
        self.width = dtype if case.theirs_under_autocast and dtype != torch.float32 else None
        self.theirs = self.exact if self.width else copy.deepcopy(self.exact).to(dtype)
        self.their_inputs = self.exact_inputs if self.width else self.our_inputs

    # ------ calls

    def ours(self, which: str) -> Call:
        """Return our callable for a pass: outputs, and of training gradients in the parameters."""
        return _call(self.ours_model, self.our_inputs, self.our_options, which)

    def _stock(self, which: str, model: Any) -> Call:
        return _call(model, self.their_inputs, self.their_options, which, self.width)

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return ours and the original's callables, on a GPU as graphs too; a compiled peer comes with ours compiled."""
        calls = self._with_graph(OURS, self.ours(which), self.ours_model)
        for peer in peers:
            if peer.attention != ORIGINAL:
                calls[peer.name] = self._refused(peer)
            elif peer.compiled:
                ours = _call(self._compiled(self.ours_model), self.our_inputs, self.our_options, which)
                calls |= {OURS + COMPILED: ours, ORIGINAL + COMPILED: self._stock(which, self._compiled(self.theirs))}
            else:
                calls |= self._with_graph(ORIGINAL, self._stock(which, self.theirs), self.theirs)
        return calls

    # ------ what a result is held against

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return calls that give outputs and gradients as vectors, those of the original under our names."""
        return {name: functools.partial(self._result, self._model(name), call) for name, call in calls.items()}

    def _model(self, implementation: str) -> nn.Module:
        return self.ours_model if implementation.startswith(OURS) else self.theirs

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what the original gives, in the wider dtype or in the one that is timed."""
        if dtype == torch.float64:
            exact = _call(self.exact, self.exact_inputs, self.their_options, which)
            self._oracle = [tensor.double() for tensor in self._result(self.exact, exact)]
            return self._oracle
        return self._result(self.theirs, self._stock(which, self.theirs))

    def terms(self, which: str) -> Mapping[str, Tensor]:
        """Return what lets a result differ by what fp32 makes of positions."""
        return {name: POSITIONS * tensor.abs() for name, tensor in zip(self.names(which), self._oracle, strict=True)}

    def _result(self, model: nn.Module, call: Call) -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        out = torch.cat([output.detach().flatten().clone() for output in call()])
        if all(p.grad is None for p in model.parameters()):
            return [out]
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
        if model is not self.ours_model:
            # A weight that several names share is one parameter, whose gradient belongs to each of them.
            shared = {id(p): gradients[name] for name, p in model.named_parameters()}
            kept = model.state_dict(keep_vars=True)
            state = {name: shared.get(id(p), torch.zeros_like(p)) for name, p in kept.items()}
            gradients = convert.to_ours(convert.rules_of(self.ours_model, ORIGINAL), state, self.ours_model.state_dict())
        vector = torch.cat([gradients[name].flatten() for name, _ in self.ours_model.named_parameters()])
        model.zero_grad(set_to_none=True)
        return [out, vector]

    # ------ what rates are of

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of a pass with keys and values for every token, as papers count them; a backward is two forwards."""
        return self._forward_flops("projected") * (3 if which == "training" else 1)

    @functools.cache  # noqa: B019, a workload lives as long as what it counts
    def _forward_flops(self, method: Any) -> int:
        return summary(self.ours_model, self.our_inputs, method=method, **self.our_options).whole.flops

    def least(self, which: str) -> tuple[int, int]:
        """Return the fewest FLOPs, projected or as our layers choose, and the fewest bytes: inputs, weights, gradients once."""
        passes = 3 if which == "training" else 1
        moved = bytes_of(self.our_inputs) + (2 if which == "training" else 1) * bytes_of(list(self.ours_model.parameters()))
        return passes * min(self._forward_flops("projected"), self._forward_flops(None)), moved


def _pair(case: ModelCase, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, PerceiverIO]:
    """The original with random weights, and ours with the same."""
    import transformers

    name, sizes = case.original
    with seeded(0):
        config = transformers.PerceiverConfig(**sizes, attention_probs_dropout_prob=0.0)
        theirs = getattr(transformers, name)(config).to(device, dtype).eval()
    ours = case.build(like="transformers", device=device, dtype=dtype).eval()
    convert.load(ours, theirs.state_dict(), ORIGINAL)
    return theirs, ours


def moved_to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Mapping):
        return {name: moved_to(item, device, dtype) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved_to(item, device, dtype) for item in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def bytes_of(value: Any) -> int:
    values: Iterable[Tensor] = value.values() if isinstance(value, Mapping) else [value] if isinstance(value, Tensor) else value
    return sum(tensor.numel() * tensor.element_size() for tensor in values)


def vectors(model: nn.Module, call: Call) -> list[Tensor]:
    """Outputs of a call as one vector, and, where it leaves some, the gradients of all parameters as another."""
    model.zero_grad(set_to_none=True)
    out = torch.cat([output.detach().flatten().clone() for output in call()])
    if all(p.grad is None for p in model.parameters()):
        return [out]
    gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return [out, gradients]


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


def _call(model: Any, inputs: Any, options: dict[str, Any], which: str, width: torch.dtype | None = None) -> Call:
    """A call that returns outputs; of training, gradients are then in the parameters. ``width``: under autocast to it."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    run: Callable[..., list[Tensor]] = _train if which == "training" else _outputs

    def call() -> list[Tensor]:
        with contextlib.nullcontext() if width is None else torch.autocast(first.device.type, width):
            return run(model, inputs, options)

    return call if which == "training" else quiet(call)


def captured(call: Call, model: nn.Module) -> Call:
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
