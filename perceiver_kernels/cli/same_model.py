"""Models of ours beside the same models through PyTorch's own attention: one set of weights, other backends.

A result is held against the model written out, in the next wider dtype, with the weights and inputs that are timed.
"""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels import use_backend
from perceiver_kernels.cli.measure import Call, seeded
from perceiver_kernels.cli.model_workload import ModelWorkload, WholeModel, bytes_of, moved_to, vectors
from perceiver_kernels.cli.models import GridCase, ModelCase, SameCase
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import OURS, Subject, quiet
from perceiver_kernels.counting import summary

SDPA = "sdpa"
"""The peer: our model through PyTorch's attention."""
JUDGED_QUERIES = 4096
"""Points of a grid that are judged, at random places."""
STARTS_AT_ZERO = 0.02
"""Standard deviation of the weights that a model starts at zero, whose zeros would hide what comes before or after them."""


def workload(case: ModelCase | GridCase | SameCase, device: torch.device, dtype: torch.dtype) -> Subject:
    """Return the models and inputs of a case."""
    kinds: dict[type, Any] = {ModelCase: ModelWorkload, GridCase: GridWorkload, SameCase: SameWorkload}
    return kinds[type(case)](case, device, dtype)


class _Same(WholeModel, abc.ABC):
    """What both kinds share: the peer is our own call with other backends."""

    original = SDPA

    @abc.abstractmethod
    def ours(self, which: str) -> Call:
        """Return our callable for a pass."""

    def _as_called(self, name: str, call: Call) -> dict[str, Call]:
        return {name: call}

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return ours, and the same model through PyTorch's attention."""
        calls = self._as_called(OURS, self.ours(which))
        for peer in peers:
            if peer == Peer(SDPA):
                calls |= self._as_called(SDPA, through(SDPA, self.ours(which)))
            else:
                calls[peer.name] = self._refused(peer)
        return calls


class SameWorkload(_Same):
    """A model of ours with random weights, forward and training; nothing of it drops anything.

    Args:
        case, device, dtype: as in `Subject`.
    """

    def __init__(self, case: SameCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        with seeded(0):
            self.model = case.build(device=device, dtype=dtype).eval()
            for parameter in self.model.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=STARTS_AT_ZERO)
        with seeded(1):
            self.inputs = moved_to(case.inputs(), device, dtype)
        self.wider = torch.float64 if dtype == torch.float32 else torch.float32

    # ------ calls

    def _as_called(self, name: str, call: Call) -> dict[str, Call]:
        return self._with_graph(name, call, self.model)

    def ours(self, which: str) -> Call:
        """Return our callable for a pass: outputs, and of training gradients in the parameters."""
        return self._call(self.model, self.inputs, which)

    def _call(self, model: nn.Module, inputs: tuple[Tensor, ...], which: str) -> Call:
        def training() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            outputs = _tensors(model(*inputs))
            torch.autograd.backward(outputs, [gradient.to(out) for out, gradient in zip(outputs, self.gradients, strict=True)])
            return outputs

        return training if which == "training" else quiet(lambda: _tensors(model(*inputs)))

    @functools.cached_property
    def gradients(self) -> list[Tensor]:
        """Gradients of the outputs: random, as a LayerNorm that ends a model has none for ones."""
        with torch.no_grad():
            outputs = _tensors(self.model(*self.inputs))
        with seeded(2):
            return [torch.randn_like(output) for output in outputs]

    # ------ what a result is held against

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return calls that give outputs and gradients as vectors."""
        return {name: functools.partial(vectors, self.model, call) for name, call in calls.items()}

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what the model gives written out, in the wider dtype or in the one that is timed."""
        if dtype != torch.float64:
            return vectors(self.model, through("reference", self.ours(which)))
        exact = copy.deepcopy(self.model).to(self.wider)
        call = self._call(exact, moved_to(self.inputs, self.device, self.wider), which)
        return [tensor.double() for tensor in vectors(exact, through("reference", call))]

    # ------ what rates are of

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of a pass with keys and values for every token, as papers count them; a backward is two forwards."""
        return self._forward_flops("projected") * (3 if which == "training" else 1)

    @functools.cache  # noqa: B019, a workload lives as long as what it counts
    def _forward_flops(self, method: Any) -> int:
        return summary(self.model, *self.inputs, method=method).whole.flops

    def least(self, which: str) -> tuple[int, int]:
        """Return the fewest FLOPs, projected or as our layers choose, and the fewest bytes: inputs, weights, gradients once."""
        passes = 3 if which == "training" else 1
        moved = bytes_of(self.inputs) + (2 if which == "training" else 1) * bytes_of(list(self.model.parameters()))
        return passes * min(self._forward_flops("projected"), self._forward_flops(None)), moved


class GridWorkload(_Same):
    """Our shape decoder with random weights, and latents of one shape.

    Args:
        case, device, dtype: as in `Subject`.
    """

    def __init__(self, case: GridCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        with seeded(0):
            wider = torch.float64 if dtype == torch.float32 else torch.float32
            exact = case.build(device=device, dtype=wider).eval()
            latents = torch.randn(1, exact.config.num_latents, exact.config.dim, device=device, dtype=wider)
            self.queries = torch.rand(1, JUDGED_QUERIES, 3, device=device) * 2 - 1
        with torch.no_grad(), use_backend("reference"):
            self.truth = exact.decode(latents, self.queries).double()
        self.model, self.latents = exact.to(dtype), latents.to(dtype)

    def ours(self, which: str) -> Call:
        """Return the callable of the whole grid."""
        return lambda: (self.model.decode_grid(self.latents, self.case.resolution),)

    def names(self, which: str) -> list[str]:
        return ["out"]

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return calls that decode the points that are judged."""
        decode = quiet(lambda: [self.model.decode(self.latents, self.queries).flatten()])
        return {name: decode if name == OURS else through(SDPA, decode) for name in calls}

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return the field at those points, written out in the wider dtype or in the one that is timed."""
        if dtype == torch.float64:
            return [self.truth.flatten()]
        with torch.no_grad(), use_backend("reference"):
            return [self.model.decode(self.latents, self.queries).flatten()]

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of the whole grid, queries projected."""
        return self._count("projected")

    def _count(self, method: Any) -> int:
        # Linear in the queries: what the latents take, and what each query adds.
        decoder = _Decoder(self.model)
        one, two = (summary(decoder, self.latents, self.queries[:, :n], method=method).whole.flops for n in (1, 2))
        return one + (self.case.resolution**3 - 1) * (two - one)

    def least(self, which: str) -> tuple[int, int]:
        """Return the fewest FLOPs, and the bytes of weights, latents and the field."""
        field = self.case.resolution**3 * self.model.config.output_dim * self.dtype.itemsize
        moved = bytes_of([self.latents, *self.model.parameters()]) + field
        return min(self._count("projected"), self._count(None)), moved


class _Decoder(nn.Module):
    """A shape decoder whose forward is its decoding, as `summary` counts forwards."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, queries: Tensor) -> Tensor:
        return self.model.decode(latents, queries)


def through(backend: str, call: Call) -> Call:
    """Run a call with one backend alone, its backward too."""

    def run() -> Any:
        with use_backend(backend):
            return call()

    return run


def _tensors(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
