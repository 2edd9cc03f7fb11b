"""One encode case as something to call: tensors, our layer, the stock layer with its weights, every pass.

Kernel passes start from a packed [B, M, C_padded] array; layer passes
are LayerNorm -> projections -> attention -> output projection, and end where the layer ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.cli import originals, textbook
from perceiver_kernels.cli.measure import Call, seeded
from perceiver_kernels.cli.stock import LAYER_PEERS, ORIGINALS, PEERS, Peer, StockCrossAttention, compiled, peers_for
from perceiver_kernels.cli.subject import (
    CHUNKED,
    ON_TRITON,
    OURS,
    OWN,
    Pass,
    heads_of,
    on_triton,
    quiet,
    saved_gradients,
    under,
)
from perceiver_kernels.nn import CrossAttention
from perceiver_kernels.testing.accuracy import shared_kv_gradient_terms

PASSES = {
    each.name: each
    for each in (
        Pass("pack", "kernel", "pack: LayerNorm without affine, padding, cast"),
        Pass("attend", "kernel", "shared-KV attention, forward"),
        Pass("attend-masked", "kernel", "shared-KV attention, forward, a fifth of the tokens hidden by a key mask"),
        Pass("dq", "kernel", "shared-KV attention, backward to the queries"),
        Pass("dx", "kernel", "shared-KV attention, backward to the inputs"),
        Pass("forward", "layer", "layer, forward"),
        Pass("forward-packed", "layer", "layer, forward, inputs packed before"),
        Pass("backward", "layer", "layer, forward + backward, inputs need no gradient"),
        Pass("backward-inputs", "layer", "layer, forward + backward, inputs too"),
    )
}

ROW_SUMS = ("q_proj", "norm_latents")
"""Parts on the latents' side whose bias gradients add up what all rows give, of either sign."""


def chunk_size(batch: int) -> int:
    """Return the tokens per chunk that keep a layer near 60 MiB, forward and backward, at 261 channels and 512 latents.

    The latents of a batch of 8 take half of that, those of one element next to nothing.
    """
    return 65_536 if batch == 1 else max(256, 8_192 // max(batch, 1))


class Workload:
    """Tensors and layers of one case: a `Subject`.

    Args:
        case: a `testing.cases.EncodeCase`.
        device, dtype: where and in what the work is done.
        inputs: the input array [B, M, C]; random when None.
        chunk: tokens per chunk of the chunked layer; `chunk_size(B)` when None.
        regime: name of the regime that the case belongs to.
    """

    norms = 2

    def __init__(
        self, case: Any, device: torch.device, dtype: torch.dtype, *, inputs: Tensor | None = None,
        chunk: int | None = None, regime: str = "encode",
    ) -> None:  # fmt: skip
        self.regime, self.case, self.device, self.dtype = regime, case, device, dtype
        self.chunk = chunk or chunk_size(case.B)
        self._terms: dict[str, Tensor] = {}
        with seeded(0):
            self.layer = self._our_layer()
            self.latents = self._randn(case.B, case.N, case.D)
            self.inputs = self._randn(case.B, case.M, case.C) if inputs is None else inputs.to(device, dtype)
            self.gradient = self._randn(case.B, case.N, case.D)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _our_layer(self, **changes: Any) -> CrossAttention:
        case = self.case
        return CrossAttention(
            case.D, case.C, num_heads=case.H, qk_channels=case.H * case.d_qk, v_channels=case.H * case.d_v,
            out_channels=case.D, residual=False, **{"device": self.device, "dtype": self.dtype, **changes},
        )  # fmt: skip

    @functools.cached_property
    def chunked_layer(self) -> CrossAttention:
        """Our layer with the same weights, reading the inputs chunk by chunk."""
        layer = self._our_layer(chunk_size=self.chunk)
        layer.load_state_dict(self.layer.state_dict())
        return layer

    @property
    def title(self) -> str:
        return describe(self.case)

    def peers(self, names: Iterable[str] | None, *, compiled: bool) -> list[Peer]:
        offered = LAYER_PEERS if self.regime == "layers" else PEERS
        return peers_for(names, (self.case.d_qk, self.case.d_v), self.device, compiled=compiled, offered=offered)

    def choice(self, which: str) -> tuple[Literal["absorbed", "projected"], str]:
        """Return the method and the backend of our callable; kernel passes are absorbed by definition."""
        if which == "pack":
            return "absorbed", str(pk.explain("pack_inputs", pk.InputArray.tokens(self.inputs)).backend)
        if PASSES[which].level == "kernel":
            forward = which.startswith("attend")
            rows = self.rows if forward else self.rows.detach().requires_grad_()
            explained = pk.explain("shared_kv_attention", rows, self.packed)
            backward = None if forward else explained.backward
            return "absorbed", str(backward or explained.backend)
        case, layer = self.case, self.layer
        differentiable = which.startswith("backward")
        q = self.latents.new_empty(case.B, case.H, case.N, case.d_qk, requires_grad=differentiable)
        inputs: Any = self.packed if which == "forward-packed" else self.inputs
        if which == "backward-inputs":
            inputs = inputs.detach().requires_grad_()
        with torch.set_grad_enabled(differentiable):
            explained = pk.explain(
                "input_cross_attention", q, inputs, layer.k_proj.weight, layer.v_proj.weight
            )
        return explained.plan.method, str(explained.backend)

    def stock_layer(self, peer: Peer, dtype: torch.dtype | None = None) -> StockCrossAttention:
        """Return the textbook layer with our weights."""
        layer = StockCrossAttention(self.case, peer, device=self.device, dtype=dtype or self.dtype)
        layer.load_state_dict(self.layer.state_dict())
        return layer

    @functools.cached_property
    def packed(self) -> pk.PackedInputs:
        """The inputs, packed once."""
        with torch.no_grad():
            return pk.pack_inputs(self.inputs)

    @functools.cached_property
    def packed_masked(self) -> pk.PackedInputs:
        """The same with a key mask, which goes with them."""
        with torch.no_grad():
            return pk.pack_inputs(self.inputs, key_mask=self.visible.expand(self.case.B, -1))

    @functools.cached_property
    def rows(self) -> Tensor:
        """Absorbed queries [B, R, C_padded], zero in the padding; scores have a standard deviation of 1."""
        case, width = self.case, self.packed.data.shape[-1]
        with seeded(1):
            rows = self._randn(case.B, case.H * case.N, width) * case.C**-0.5
        rows[..., case.C :] = 0
        return rows

    @functools.cached_property
    def visible(self) -> Tensor:
        """Which tokens a key mask leaves [M], about four in five."""
        with seeded(3):
            return torch.rand(self.case.M, device=self.device) < 0.8

    @functools.cached_property
    def row_gradient(self) -> Tensor:
        """Gradient of z, shaped as `rows`."""
        with seeded(2):
            return torch.randn_like(self.rows)

    # ------ calls

    def ours(self, which: str) -> Call:
        """Return our callable for a pass; it gives the tensors that `names` lists."""
        if which == "pack":
            return quiet(lambda: (pk.pack_inputs(self.inputs).data,))
        if which == "attend-masked":
            q, x = self.rows, self.packed_masked
            return quiet(lambda: (pk.shared_kv_attention(q, x),))
        if PASSES[which].level == "kernel":
            return self._kernel_call(which, lambda q, x: pk.shared_kv_attention(q, x))
        inputs: Any = self.packed if which == "forward-packed" else self.inputs
        return self.layer_call(which, self.layer, inputs)

    def chunked(self, which: str) -> Call:
        """Return our callable for a layer pass, chunked."""
        return self.layer_call(which, self.chunked_layer, self.inputs)

    def stock(self, which: str, peer: Peer) -> Call:
        """Return a stock peer's callable for a pass."""
        if which == "pack":
            run: Any = functools.partial(_normalize_and_pad, pad=self.packed.data.shape[-1] - self.case.C)
            run = compiled(run) if peer.compiled else run
            return quiet(lambda: (run(self.inputs),))
        if PASSES[which].level == "kernel":
            attend = functools.partial(_shared_as_stock, peer)
            attend = compiled(attend) if peer.compiled else attend
            return self._kernel_call(which, attend, peer)
        if peer.attention in ORIGINALS:
            return self._original(which, peer)
        layer: Any = self.stock_layer(peer)
        layer = compiled(layer) if peer.compiled else layer
        return self.layer_call(which, layer, self.inputs, peer)

    def _original(self, which: str, peer: Peer) -> Call:
        """The layer of another package, made at the first call: what it refuses is its result."""

        @functools.cache
        def made() -> Call:
            layer: Any = originals.layer(peer.attention, self.case, self.layer, self.device, self.dtype)
            return self.layer_call(which, compiled(layer) if peer.compiled else layer, self.inputs)

        return lambda: made()()

    def _kernel_call(
        self, which: str, attend: Callable[[Tensor, Tensor], Tensor], peer: Peer | None = None
    ) -> Call:
        q, x = self.rows, self.packed.data
        if which == "attend":
            return under(peer, quiet(lambda: (attend(q, x),)))
        wanted = (q if which == "dq" else x).detach().requires_grad_()
        q, x = (wanted, x) if which == "dq" else (q, wanted)
        return under(peer, saved_gradients(lambda: attend(q, x), [wanted], self.row_gradient))

    def calls(self, which: str, peers: Sequence[Peer]) -> dict[str, Call]:
        """Return ours, chunked where there is such a form, and the peers' callables for a pass."""
        calls = {OURS: self.ours(which)}
        if which == "forward-packed":
            return calls
        if PASSES[which].level == "layer":
            calls[CHUNKED] = self.chunked(which)
        elif self.choice(which)[1] == "cuda" and pk.backends()["triton"][0]:
            calls[ON_TRITON] = on_triton(self.ours(which))
        if which == "attend-masked":
            return calls
        # Packing has two stock forms only: written out, and compiled.
        usable = [peer for peer in peers if which != "pack" or peer.attention == "eager"]
        return calls | {peer.name: self.stock(which, peer) for peer in usable}

    def layer_call(self, which: str, layer: Any, inputs: Any, peer: Peer | None = None) -> Call:
        """Return the callable that runs a layer pass over a layer."""
        return under(peer, layer_pass(which, layer, self.latents, inputs, self.gradient))

    def names(self, which: str) -> list[str]:
        """Return the names of the tensors that a pass gives."""
        if which == "pack":
            return ["packed"]
        if PASSES[which].level == "kernel":
            return ["z" if which.startswith("attend") else which]
        if which in ("forward", "forward-packed"):
            return ["out"]
        names = ["out", "dlatents", *(f"d{name}" for name, _ in self.layer.named_parameters())]
        return [*names, "dinputs"] if which == "backward-inputs" else names

    def results(self, which: str, calls: Mapping[str, Call]) -> dict[str, Call]:
        """Return the calls themselves."""
        return dict(calls)

    # ------ what a result is held against

    def specification(self, which: str, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return what a pass should give, from the streamed textbook in a dtype."""
        if which == "pack":
            return [reference.pack_inputs(self.inputs.to(dtype))[0]]
        if which == "attend-masked":
            return textbook.shared_kv("attend", self.rows, self.packed.data[:, self.visible], self.row_gradient, dtype)
        if PASSES[which].level == "kernel":
            return textbook.shared_kv(which, self.rows, self.packed.data, self.row_gradient, dtype)
        layer = textbook.Textbook(self.stock_layer(Peer("eager"), dtype), dtype)
        for name in ROW_SUMS if dtype == torch.float64 else ():
            layer.layer.get_submodule(name).register_full_backward_hook(functools.partial(self._keep_terms, name))
        # Inputs that need a gradient become a leaf of this dtype; others are converted part by part.
        inputs = self.inputs.to(dtype) if which == "backward-inputs" else self.inputs
        return layer_pass(which, layer, self.latents.to(dtype), inputs, self.gradient.to(dtype))()

    def terms(self, which: str) -> dict[str, Tensor]:
        """Return those of the biases of ``ROW_SUMS``, and of the queries' gradient where one input makes all of it cancel."""
        if which != "dq" or self.case.M > 1:
            return self._terms if which.startswith("backward") else {}
        return {"dq": shared_kv_gradient_terms(self.rows, self.packed.data, self.row_gradient)[0]}

    def forget(self) -> None:
        """Nothing: gradients are results of these calls, and nowhere else."""

    def _keep_terms(self, name: str, module: Any, gradients: Any, upstream: tuple[Tensor, ...]) -> None:
        self._terms[f"d{name}.bias"] = upstream[0].abs().flatten(0, -2).sum(0)

    def method(self, which: str, implementation: str) -> Literal["absorbed", "projected"]:
        """Return how an implementation gets at keys and values; stock PyTorch projects."""
        if implementation in (CHUNKED, ON_TRITON):
            return "absorbed"
        return self.choice(which)[0] if implementation == OURS else "projected"

    def labels(self, which: str, implementation: str) -> dict[str, str]:
        """Return an implementation's method and backend."""
        backend = self.choice(which)[1] if implementation in OWN else "stock"
        backend = "triton" if implementation == ON_TRITON else backend
        return {"method": self.method(which, implementation), "backend": backend}

    def flops(self, which: str, implementation: str) -> int:
        """Return the FLOPs of a pass by an implementation's method."""
        return flops(self.case, which, self.method(which, implementation))

    def least(self, which: str) -> tuple[int, int]:
        """Return the fewest FLOPs, by either method, and the fewest bytes of a pass."""
        fewest = min(flops(self.case, which, "absorbed"), flops(self.case, which, "projected"))
        return fewest, least_bytes(self.case, which, self.dtype.itemsize)


def layer_pass(which: str, layer: Any, latents: Tensor, inputs: Any, gradient: Tensor) -> Call:
    """Return the callable of a layer pass: out, then gradients of latents, weights (and inputs).

    A layer whose parameters are others than ours has ``as_ours``, which makes ours of the gradients of its own.
    """
    if which in ("forward", "forward-packed"):
        return quiet(lambda: (layer(latents, inputs),))
    latents = latents.detach().requires_grad_()
    leaves = [latents, *layer.parameters()]
    if which == "backward-inputs":
        inputs = inputs.detach().requires_grad_()
        leaves.append(inputs)
    as_ours = layer.as_ours if hasattr(layer, "as_ours") else lambda gradients: gradients

    def forward_backward() -> tuple[Tensor, ...]:
        out = layer(latents, inputs)
        first, *rest = torch.autograd.grad(out, leaves, gradient)
        return (out.detach(), first, *as_ours(rest))

    return forward_backward


def describe(case: Any) -> str:
    """Return an encode case in one line."""
    return f"{case.name}: B={case.B}, {case.M:,} inputs, {widths_of(case)}"


def widths_of(case: Any) -> str:
    """Return what of an encode case stays when its batch and its inputs are swept."""
    return f"{case.C} channels, {case.N} latents x {case.D}, {heads_of(case)}"


def flops(case: Any, which: str, method: Literal["absorbed", "projected"]) -> int:
    """Return the FLOPs of a pass with the real C, a multiply and an add counted as two.

    Absorbed, per row and token and channel: forward 4 (S and z), dq 6 (S, dP, dq), dx 8 (S, dP and two into
    dx). Hidden tokens count as others do.
    Projected: 2 (d_qk + d_v) forward; 6 d_qk + 4 d_v backward (S again, dP, dq, dk, dv); the projections once
    forward and twice backward.
    """
    B, M, C, N, D, H = case.B, case.M, case.C, case.N, case.D, case.H
    scores, widths = B * H * N * M, H * (case.d_qk + case.d_v)
    kernels = {"pack": 0, "attend": 4 * scores * C, "attend-masked": 4 * scores * C, "dq": 6 * scores * C, "dx": 8 * scores * C}
    if which in kernels:
        return kernels[which]
    latent_side = 2 * B * N * D * widths
    if method == "absorbed":
        latent_side += 2 * B * N * C * widths
        backward = {"backward": kernels["dq"], "backward-inputs": kernels["dq"] + kernels["dx"]}
        return kernels["attend"] + backward.get(which, 0) + latent_side * (3 if which in backward else 1)
    projections = 2 * B * M * C * widths
    forward = 2 * scores * (case.d_qk + case.d_v) + projections
    if which in ("forward", "forward-packed"):
        return forward + latent_side
    # LayerNorm's affine part has gradients too, so the projections' own flow through them either way.
    return forward + scores * (6 * case.d_qk + 4 * case.d_v) + 2 * projections + 3 * latent_side


def least_bytes(case: Any, which: str, itemsize: int) -> int:
    """Return the fewest bytes a pass moves: every input read once, every result written once."""
    tokens, padded = case.B * case.M, -(-case.C // 16) * 16
    rows = case.B * case.H * case.N * padded
    kernels = {
        "pack": tokens * (case.C + padded),
        "attend": tokens * padded + 2 * rows,
        "attend-masked": tokens * padded + 2 * rows,
        "dq": tokens * padded + 3 * rows,
        "dx": 2 * tokens * padded + 2 * rows,
    }
    latents = 2 * case.B * case.N * case.D
    layers = {
        "forward": tokens * case.C + latents,
        "forward-packed": tokens * padded + latents,
        "backward": tokens * case.C + 2 * latents,
        "backward-inputs": 2 * tokens * case.C + 2 * latents,
    }
    return itemsize * {**kernels, **layers}[which]


def _normalize_and_pad(x: Tensor, pad: int) -> Tensor:
    return F.pad(F.layer_norm(x, (x.shape[-1],)), (0, pad))


def _shared_as_stock(peer: Peer, q: Tensor, x: Tensor) -> Tensor:
    """Shared-KV attention in stock PyTorch: one head, the inputs given twice, as keys and as values."""
    return peer.attend(q[:, None], x[:, None], x[:, None], 1.0)[:, 0]
