"""Models of other libraries before and after `replace_attention`, with one set of weights and in one run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels import replace_attention
from perceiver_kernels.cli.measure import Call, seeded
from perceiver_kernels.cli.model_workload import WholeModel, bytes_of, moved_to, vectors
from perceiver_kernels.cli.models import IMAGENET, ONE_HEAD
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import COMPILED, OURS, quiet

ORIGINAL = "original"
"""The peer: the model as its library has it."""
POSITIONS = 16.0
"""Times the fp32 floor of the accuracy rule, as for whole models: libraries make Fourier features in fp32 or less."""


@dataclass(frozen=True)
class ReplacedCase:
    """A model of a library and a call of it.

    Args:
        name: of the case.
        package: that it is of, as it is installed.
        build: makes the model; keyword arguments change its sizes.
        inputs: float tensors that the call takes, on a CPU.
        call: runs the model on them.
        shape: of the problem, for rows.
        small: keyword arguments of ``build``, and ``inputs``, at sizes for a CPU.
        is_layer: whether it is one layer, and no whole model.
    """

    name: str
    package: str
    build: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    shape: dict[str, int]
    small: Mapping[str, Any]
    call: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    is_layer: bool = False
    passes: tuple[str, ...] = field(default=("forward", "training"))
    compiles: ClassVar[bool] = True
    """What torch.compile makes of a case is measured too."""

    @property
    def title(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.name}: {self.package}, {sizes}"

    def scaled(self, max_inputs: int | None = None) -> ReplacedCase:
        """The same model at sizes for a CPU, whatever the limit."""
        sizes = {name: value for name, value in self.small.items() if name not in ("inputs", "shape")}
        return replace(
            self, build=functools.partial(self.build, **sizes), inputs=self.small["inputs"], shape=self.small["shape"]
        )

    def cut(self, max_inputs: int) -> ReplacedCase:
        """The case itself: a model's inputs have one length."""
        return self


def _transformers(**sizes: Any) -> nn.Module:
    import transformers

    config = {**IMAGENET, **ONE_HEAD, "num_labels": 1000, "attention_probs_dropout_prob": 0.0, **sizes}
    return transformers.PerceiverForImageClassificationFourier(transformers.PerceiverConfig(**config))


def _perceiver_pytorch(**sizes: Any) -> nn.Module:
    """The model of its README."""
    import perceiver_pytorch

    readme = {
        "input_channels": 3, "input_axis": 2, "num_freq_bands": 6, "max_freq": 10.0, "depth": 6, "num_latents": 256,
        "latent_dim": 512, "cross_heads": 1, "latent_heads": 8, "cross_dim_head": 64, "latent_dim_head": 64,
        "num_classes": 1000, "attn_dropout": 0.0, "ff_dropout": 0.0, "weight_tie_layers": False, "fourier_encode_data": True,
        "self_per_cross_attn": 2,
    }  # fmt: skip
    return perceiver_pytorch.Perceiver(**{**readme, **sizes})


def _flamingo_pytorch(**sizes: Any) -> nn.Module:
    """The resampler of its README."""
    import flamingo_pytorch

    readme = {"dim": 1024, "depth": 2, "dim_head": 64, "heads": 8, "num_latents": 64, "num_media_embeds": 4}
    return flamingo_pytorch.PerceiverResampler(**{**readme, **sizes})


def _attention(**sizes: Any) -> nn.Module:
    return nn.MultiheadAttention(**{"embed_dim": 512, "num_heads": 8, "batch_first": True, **sizes})


def _read(model: nn.Module, queries: Tensor, inputs: Tensor) -> Tensor:
    return model(queries, inputs, inputs, need_weights=False)[0]


def _random(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _attention_case(name: str, channels: int, heads: int) -> ReplacedCase:
    B, N, M, E = 8, 512, 50_176, 512
    return ReplacedCase(
        name, "torch", functools.partial(_attention, num_heads=heads, kdim=channels, vdim=channels),
        _random((B, N, E), (B, M, channels)), {"B": B, "N": N, "M": M, "C": channels, "D": E, "H": heads},
        {
            "embed_dim": 16, "kdim": 12, "vdim": 12, "inputs": _random((2, 6, 16), (2, 40, 12)),
            "shape": {"B": 2, "N": 6, "M": 40, "C": 12, "D": 16, "H": heads},
        },
        _read, is_layer=True,
    )  # fmt: skip


REPLACED = {
    case.name: case
    for case in (
        ReplacedCase(
            "transformers-imagenet-b8", "transformers", _transformers, _random((8, 3, 224, 224)), {"B": 8, "N": 512, "D": 1024},
            {
                "num_latents": 6, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
                "num_self_attention_heads": 2, "num_labels": 5, "inputs": _random((2, 3, 8, 8)),
                "shape": {"B": 2, "N": 6, "D": 16},
            },
        ),
        ReplacedCase(
            "perceiver-pytorch-readme-b8", "perceiver-pytorch", _perceiver_pytorch, _random((8, 224, 224, 3)),
            {"B": 8, "N": 256, "D": 512},
            {
                "depth": 2, "num_latents": 6, "latent_dim": 16, "cross_dim_head": 8, "latent_heads": 2, "latent_dim_head": 8,
                "num_classes": 5, "inputs": _random((2, 6, 6, 3)), "shape": {"B": 2, "N": 6, "D": 16},
            },
        ),
        ReplacedCase(
            "flamingo-resampler-b32", "flamingo-pytorch", _flamingo_pytorch, _random((32, 2048, 1024)),
            {"B": 32, "N": 64, "M": 2048, "D": 1024},
            {
                "dim": 16, "heads": 2, "dim_head": 8, "num_latents": 5, "inputs": _random((2, 11, 16)),
                "shape": {"B": 2, "N": 5, "M": 11, "D": 16},
            },
            is_layer=True,
        ),
        _attention_case("torch-512x50k-c512-h8", 512, 8),
        _attention_case("torch-512x50k-c261-h1", 261, 1),
    )
}  # fmt: skip


class ReplacedWorkload(WholeModel):
    """A model as its library has it and a copy after `replace_attention`: a `Subject` of regime "replaced".

    Args:
        case, device, dtype: as in `Subject`.

    Raises:
        ImportError: the package is not installed.
        ValueError: nothing in the model was replaced.
    """

    regime, original = "replaced", ORIGINAL

    def __init__(self, case: ReplacedCase, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        wider = torch.float64 if dtype == torch.float32 else torch.float32
        with seeded(0):
            self.exact = case.build().to(device, wider).eval()
        with seeded(1):
            self.exact_inputs = tuple(moved_to(tensor, device, wider) for tensor in case.inputs())
        self.stock = copy.deepcopy(self.exact).to(dtype)
        self.inputs = tuple(tensor.to(dtype) for tensor in self.exact_inputs)
        self.replaced = copy.deepcopy(self.stock)
        self.report = replace_attention(self.replaced)
        if not self.report.converted:
            raise ValueError(f"{case.name}: {self.report}")

    @property
    def title(self) -> str:
        return f"{self.case.title}; {len(self.report.converted)} modules replaced, {len(self.report.kept)} left alone"

    def ours(self, which: str) -> Call:
        """Return the callable of the replaced model."""
        return self._call(self.replaced, self.inputs, which)

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return the replaced model and the original, on a GPU as graphs too; a compiled original comes with ours compiled."""
        calls = self._with_graph(OURS, self.ours(which), self.replaced)
        for peer in peers:
            if peer.attention != ORIGINAL:
                calls[peer.name] = self._refused(peer)
            elif peer.compiled:
                calls[OURS + COMPILED] = self._call(self._compiled(self.replaced), self.inputs, which)
                calls[ORIGINAL + COMPILED] = self._call(self._compiled(self.stock), self.inputs, which)
            else:
                calls |= self._with_graph(ORIGINAL, self._call(self.stock, self.inputs, which), self.stock)
        return calls

    def _call(self, model: Any, inputs: tuple[Tensor, ...], which: str) -> Call:
        def forward() -> list[Tensor]:
            result = self.case.call(model, *inputs)
            return [getattr(result, "logits", result)]

        def training() -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            outputs = forward()
            torch.autograd.backward(outputs, [self.gradient.to(output) for output in outputs])
            return outputs

        return training if which == "training" else quiet(forward)

    @functools.cached_property
    def gradient(self) -> Tensor:
        """Gradient of the output: random, as a LayerNorm that ends a model has none for ones."""
        (output,) = self._call(self.stock, self.inputs, "forward")()
        with seeded(2):
            return torch.randn_like(output)

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return calls that give outputs and gradients as vectors."""
        return {
            name: functools.partial(vectors, self.replaced if name.startswith(OURS) else self.stock, call)
            for name, call in calls.items()
        }

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what the original gives, in the wider dtype or in the one that is timed."""
        if dtype == torch.float64:
            exact = vectors(self.exact, self._call(self.exact, self.exact_inputs, which))
            self._oracle = [tensor.double() for tensor in exact]
            return self._oracle
        return vectors(self.stock, self._call(self.stock, self.inputs, which))

    def terms(self, which: str) -> Mapping[str, Tensor]:
        """Return what lets a result differ by what fp32 makes of positions."""
        return {name: POSITIONS * tensor.abs() for name, tensor in zip(self.names(which), self._oracle, strict=True)}

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of the original's matrix products; a backward is two forwards."""
        return self._forward_flops() * (3 if which == "training" else 1)

    @functools.cache  # noqa: B019, a workload lives as long as what it counts
    def _forward_flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            # With gradients: torch's counter fails at views without them.
            self.case.call(self.stock, *self.inputs)
        return counter.get_total_flops()

    def least(self, which: str) -> tuple[int, int]:
        """Return the original's FLOPs, and the fewest bytes: inputs, weights and gradients once."""
        passes = 2 if which == "training" else 1
        return self.flops(which, OURS), bytes_of(self.inputs) + passes * bytes_of(list(self.replaced.parameters()))
