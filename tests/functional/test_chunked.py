"""Chunked cross-attention: any chunk size gives the whole result, and memory does not grow with the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.absorption import absorb_queries, project_values
from perceiver_kernels.testing import assert_as_accurate, same_bits
from perceiver_kernels.testing.targets import Target, machine, only
from tests.functional.layers import SEED, know_the_seed

OP = "shared_kv_attention"
B, H, N, M, C = 2, 2, 17, 50, 53
SIZES = (11, 16, 25, 49, 50, 64)


def wanted(target: Target) -> bool:
    """sdpa returns no lse, so that its chunks cannot be merged; bf16 rounds as fp16 does."""
    return target.backend not in ("sdpa", "cuda") and target.dtype != torch.bfloat16


@pytest.fixture(autouse=True)
def known_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    know_the_seed(monkeypatch)


def weights(target: Target, channels: int = C) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "q": (B, H, N, 8),
        "w_k": (16, channels),
        "w_v": (22, channels),
        "b_v": (22,),
        "norm_weight": (channels,),
        "norm_bias": (channels,),
    }
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    for name in ("w_k", "w_v"):
        drawn[name] *= channels**-0.5
    # Weights about 1, as training leaves them: attention that is spread over tokens.
    drawn["norm_weight"] = 1 + 0.2 * drawn["norm_weight"]
    return {name: value.to(target.device, target.dtype) for name, value in drawn.items()}


def content(target: Target, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(target.device, target.dtype)


def gradient_like(out: Tensor) -> Tensor:
    return torch.linspace(-9, 9, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).cos().to(out.dtype)


def evaluated(
    function: Any, tensors: dict[str, Tensor], inputs: Any, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients; ``inputs`` is a tensor (its gradient is taken too) or an InputArray (data)."""
    leaves = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
    if isinstance(inputs, Tensor):
        inputs = leaves["inputs"] = inputs.detach().to(dtype or inputs.dtype).requires_grad_()
    named = {name: leaf for name, leaf in leaves.items() if name != "inputs"}
    out = function(named.pop("q"), inputs, named.pop("w_k"), named.pop("w_v"), **named, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), gradient_like(out))
    return {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def value_side_terms(tensors: dict[str, Tensor], dense: Tensor, out: Tensor, **visible: Any) -> dict[str, Tensor]:
    """What the gradients of the value projection and of LayerNorm add up over all rows, without cancellation.

    They are products of z, weights and the output's gradient: the same gradients, taken at absolute values.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    hide = {name: visible[name] for name in ("key_mask", "lengths") if name in visible}
    packed, _ = reference.pack_inputs(
        dense.double(), key_mask=reference.visible_keys(dense.shape[1], hide.get("key_mask"), hide.get("lengths"))
    )
    absorbed = absorb_queries(wide["q"], wide["w_k"], wide["norm_weight"], packed.shape[-1], torch.float64)
    z, _, rho = reference.shared_kv_attention(absorbed, packed, scale=wide["q"].shape[-1] ** -0.5, **visible)
    names = ("w_v", "b_v", "norm_weight", "norm_bias")
    leaves = {name: wide[name].abs().requires_grad_() for name in names}
    total = project_values(z.abs(), rho, H, *leaves.values())
    return dict(
        zip(
            (f"d{name}" for name in names),
            torch.autograd.grad(total, list(leaves.values()), gradient_like(out).abs()),
            strict=True,
        )
    )


def judge(target: Target, tensors: dict[str, Tensor], inputs: Any, dense: Tensor, chunk_size: int, **options: Any) -> None:
    """Chunked against the textbook on ``dense``, the same inputs with their positions written out."""
    actual = evaluated(pk.input_cross_attention, tensors, inputs, chunk_size=chunk_size, backend=target.backend, **options)
    visible = {name: options[name] for name in ("key_mask", "lengths") if name in options}
    if isinstance(inputs, pk.InputArray):
        visible = {name: value for name in ("key_mask", "lengths") if (value := getattr(inputs, name)) is not None}
    visible = {name: value.to(target.device) for name, value in visible.items()}
    if options.get("dropout_p"):
        visible |= {"dropout_p": options["dropout_p"], "dropout_seed": SEED.to(target.device)}
    eager, oracle = (
        evaluated(reference.input_cross_attention, tensors, dense, dtype, **visible) for dtype in (target.dtype, torch.float64)
    )
    terms = value_side_terms(tensors, dense, oracle["out"], **visible)
    for name, value in actual.items():
        assert_as_accurate(value, eager[name], oracle[name], f"{target} {name}", terms=terms.get(name))


def hidden(kind: str, target: Target) -> dict[str, Any]:
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[0, 5:25], mask[1] = False, False
    options: dict[str, Any] = {
        "all": {}, "key_mask": {"key_mask": mask}, "lengths": {"lengths": torch.tensor([18, 0], dtype=torch.int32)},
        "dropout": {"dropout_p": 0.3}, "mask and dropout": {"key_mask": mask, "dropout_p": 0.3},
    }[kind]  # fmt: skip
    return {name: value.to(target.device) if isinstance(value, Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("kind", ["all", "key_mask", "lengths", "dropout", "mask and dropout"])
@pytest.mark.parametrize("chunk_size", [25] if machine() == "interpreter" else [11, 49])
def test_chunks_are_the_whole(target: Target, chunk_size: int, kind: str) -> None:
    """Whole chunks may be invisible, the last is short; dropout depends on a token's place, not on its chunk."""
    inputs = content(target, B, M, C)
    judge(target, weights(target), inputs, inputs, chunk_size, **hidden(kind, target))


@pytest.mark.parametrize("chunk_size", SIZES)
@only(torch.float32)
def test_chunk_sizes(target: Target, chunk_size: int) -> None:
    inputs = content(target, B, M, C)
    judge(target, weights(target), inputs, inputs, chunk_size)


@only(torch.float32)
def test_raw_bytes_in_host_memory_with_fourier_positions(target: Target) -> None:
    """Only slices of the pixels are converted, moved and given positions."""
    images = torch.randint(0, 256, (B, 3, 5, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    raw = pk.InputArray.image(images, pk.FourierPositions(4, (5.0, 10.0)), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    whole = raw.slice(device=target.device)
    features = reference.fourier_features(whole.positions, 4, (5.0, 10.0)).expand(B, -1, -1)
    dense = torch.cat([whole.content, features], -1)
    judge(target, weights(target, dense.shape[-1]), raw, dense, 13)


@pytest.mark.parametrize("kind", ["given", "coordinates"])
@only(torch.float32)
def test_positions(target: Target, kind: str) -> None:
    values, places = content(target, B, M, 3), content(target, B, M, 2).float().tanh()
    fourier = pk.FourierPositions(4, (9.0, 9.0))
    features = reference.fourier_features(places, 4, (9.0, 9.0)) if kind == "coordinates" else places
    given = {"positions": fourier, "coordinates": places} if kind == "coordinates" else {"positions": places}
    dense = torch.cat([values, features.to(values.dtype)], -1)
    lengths = torch.tensor([M, 11], dtype=torch.int32, device=target.device)
    judge(target, weights(target, dense.shape[-1]), pk.InputArray(values, lengths=lengths, **given), dense, 16)


@only(torch.float32)
def test_no_tokens(target: Target) -> None:
    inputs = content(target, B, 0, C)
    judge(target, weights(target), inputs, inputs, 4)


@only(torch.float32)
def test_packed_inputs_stay_as_they_are(target: Target) -> None:
    inputs, tensors = content(target, B, M, C), weights(target)
    packed = pk.pack_inputs(inputs, backend=target.backend)
    out = evaluated(pk.input_cross_attention, tensors, packed, chunk_size=7, backend=target.backend)["out"]
    torch.testing.assert_close(out, evaluated(reference.input_cross_attention, tensors, inputs)["out"])


@only(torch.float32)
def test_what_is_kept_for_the_backward_does_not_grow(target: Target) -> None:
    """Bytes that autograd saves beside the weights: the same for five times the tokens."""
    sizes = []
    for tokens in (20, 100):
        saved: list[int] = []
        raw = pk.InputArray.tokens(content(target, B, tokens, C))
        leaves = {name: tensor.requires_grad_() for name, tensor in weights(target).items()}
        known = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}

        def pack(tensor: Tensor, saved: list[int] = saved, known: set[int] = known) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                saved.append(storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = pk.input_cross_attention(
                leaves.pop("q"), raw, leaves.pop("w_k"), leaves.pop("w_v"), **leaves, chunk_size=10, backend=target.backend
            )
        assert out.requires_grad
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1] > 0


def chunked(target: Target, raw: Any, chunk_size: int = 20, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of ``raw`` in chunks, and the leaves that it was computed with."""
    leaves = {name: tensor.requires_grad_() for name, tensor in weights(target).items() if name in ("q", "w_k", "w_v")}
    return pk.input_cross_attention(**leaves, inputs=raw, chunk_size=chunk_size, backend=target.backend, **options), leaves


@pytest.mark.parametrize("changed", ["content", "positions", "coordinates", "key_mask", "lengths"])
@only(torch.float32)
def test_inputs_changed_in_place_are_noticed(target: Target, changed: str) -> None:
    """The backward reads all of the raw inputs again: if one has changed since, a gradient would be of another input."""
    mask, lengths = torch.ones(B, M, dtype=torch.bool), torch.full((B,), M, dtype=torch.int32)
    options = {
        "positions": {"positions": content(target, M, 3)},
        "coordinates": {"positions": pk.FourierPositions(1, (9.0,)), "coordinates": content(target, B, M, 1).tanh()},
        "key_mask": {"positions": content(target, M, 3), "key_mask": mask.to(target.device)},
        "lengths": {"positions": content(target, M, 3), "lengths": lengths.to(target.device)},
    }  # fmt: skip
    raw = pk.InputArray(content(target, B, M, C - 3).requires_grad_() * 1.0, **options.get(changed, options["positions"]))
    out, _ = chunked(target, raw)
    with torch.no_grad():
        getattr(raw, changed).fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@only(torch.float32)
def test_inference_mode(target: Target) -> None:
    """Inference tensors count no versions: they are read within inference_mode and, as data, trained on outside."""
    expected, leaves = chunked(target, content(target, B, M, C))
    truth = torch.autograd.grad(expected.sum(), list(leaves.values()))
    with torch.inference_mode():
        raw = content(target, B, M, C)
        assert same_bits(chunked(target, raw)[0], expected)
    out, leaves = chunked(target, raw)
    assert all(map(same_bits, torch.autograd.grad(out.sum(), list(leaves.values())), truth))


@pytest.mark.parametrize("reentrant", [True, False])
@only(torch.float32)
def test_checkpointing(target: Target, reentrant: bool) -> None:
    """Results that are computed again for the backward are unpacked once."""
    leaves = [tensor.requires_grad_() for name, tensor in weights(target).items() if name in ("q", "w_k", "w_v")]
    inputs = content(target, B, M, C).requires_grad_()

    def read(q: Tensor, inputs: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
        return pk.input_cross_attention(q, inputs, w_k, w_v, chunk_size=20, dropout_p=0.3, backend=target.backend)

    def gradients(out: Tensor) -> list[Tensor]:
        for leaf in (inputs, *leaves):
            leaf.grad = None
        out.square().sum().backward()
        return [leaf.grad for leaf in (inputs, *leaves)]

    truth = gradients(read(leaves[0], inputs, *leaves[1:]))
    found = gradients(checkpoint(read, leaves[0], inputs, *leaves[1:], use_reentrant=reentrant))
    assert all(map(same_bits, found, truth))


@pytest.mark.parametrize("of", ["q", "inputs"])
@only(torch.float32)
def test_second_derivative_is_refused(target: Target, of: str) -> None:
    """Of a constant incoming gradient too: q and the inputs are what the first one depends on."""
    inputs = content(target, B, M, C).requires_grad_()
    out, leaves = chunked(target, inputs)
    (gradient,) = torch.autograd.grad(out.sum(), (leaves | {"inputs": inputs})[of], create_graph=True)
    with pytest.raises(RuntimeError, match="chunk_size have no second derivative"):
        torch.autograd.grad(gradient.square().sum(), (leaves["q"], inputs))


@pytest.mark.parametrize("trained", ["positions", "coordinates"])
@only(torch.float32)
def test_trained_positions_are_refused(target: Target, trained: str) -> None:
    """Their gradient would be lost: the backward of a chunk gives that of the content alone."""
    fourier = {"positions": pk.FourierPositions(2, (9.0,))} if trained == "coordinates" else {}
    leaf = content(target, M, 1 if fourier else 5).requires_grad_()
    raw = pk.InputArray(content(target, B, M, C - 5), **fourier | {trained: leaf})
    with pytest.raises(ValueError, match=f"chunk_size needs {trained} without gradient: .* are trained on whole inputs"):
        chunked(target, raw)
    with torch.no_grad():
        out, _ = chunked(target, raw)
    assert out.isfinite().all()


def test_backends_that_cannot_merge_are_refused_with_reasons() -> None:
    q, inputs, w = torch.randn(1, 1, 2, 4), torch.randn(1, 9, 5), torch.randn(4, 5)
    with pytest.raises(ValueError, match="sdpa does not return lse"):
        pk.input_cross_attention(q, inputs, w, w, chunk_size=3, backend="sdpa")
