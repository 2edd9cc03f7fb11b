"""The specification against torch, hand-worked numbers and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from perceiver_kernels import reference
from perceiver_kernels.inputs import FourierPositions
from perceiver_kernels.testing import DECODE, PROCESS, assert_as_accurate

NAN = float("nan")
close = torch.testing.assert_close


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def qkv(B: int = 2, H: int = 3, Lq: int = 5, Lk: int = 7, d_qk: int = 4, d_v: int = 6, grad: bool = False):
    return (
        randn(B, H, Lq, d_qk, seed=1, grad=grad),
        randn(B, H, Lk, d_qk, seed=2, grad=grad),
        randn(B, H, Lk, d_v, seed=3, grad=grad),
    )


def some_visible(B: int, M: int) -> Tensor:
    """A mask in which every row sees its first key and about half of the others."""
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[:, :1] = True
    return mask


class TestLayerNorm:
    @pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
    def test_equals_torch(self, affine: str) -> None:
        x = 3 + 2 * randn(4, 5, 13)
        weight = randn(13, seed=1) if affine in ("weight", "both") else None
        bias = randn(13, seed=2) if affine in ("bias", "both") else None
        close(reference.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (13,), weight, bias, 1e-3))

    def test_hand_worked(self) -> None:
        x = torch.tensor([1.0, 3.0], dtype=torch.float64)
        expected = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(1 + 0.5)
        close(reference.layer_norm(x, eps=0.5), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_statistics_are_fp32(self, dtype: torch.dtype) -> None:
        """Rounded once at the end: sums of 700 bf16 numbers around 30 would lose everything."""
        x = (30 + randn(9, 700)).to(dtype)
        out = reference.layer_norm(x)
        assert out.dtype == dtype
        exact = F.layer_norm(x.double(), (700,))
        close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)

    def test_gradients(self) -> None:
        tensors = randn(2, 3, 5, grad=True), randn(5, seed=1, grad=True), randn(5, seed=2, grad=True)
        assert gradcheck(reference.layer_norm, tensors)


class TestFourierFeatures:
    def test_hand_worked(self) -> None:
        """One axis, frequencies 1 and 2, at 1/2: sines 1 and 0, cosines 0 and -1."""
        x = torch.tensor([[0.5]], dtype=torch.float64)
        expected = {"deepmind": [0.5, 1, 0, 0, -1], "perceiver-pytorch": [1, 0, 0, -1, 0.5]}
        for order, features in expected.items():
            close(reference.fourier_features(x, 2, (4,), True, order), x.new_tensor([features]))

    @pytest.mark.parametrize("include_raw", [True, False])
    def test_order_over_two_axes(self, include_raw: bool) -> None:
        x = torch.tensor([0.25, -1.0], dtype=torch.float64)
        a, b = ((math.pi * f * v) for f, v in ((1, 0.25), (1, -1.0)))
        c, d = ((math.pi * f * v) for f, v in ((3, 0.25), (2, -1.0)))
        deepmind = [math.sin(a), math.sin(c), math.sin(b), math.sin(d)]
        deepmind += [math.cos(a), math.cos(c), math.cos(b), math.cos(d)]
        by_axis = [math.sin(a), math.sin(c), math.cos(a), math.cos(c), 0.25][: 4 + include_raw]
        by_axis += [math.sin(b), math.sin(d), math.cos(b), math.cos(d), -1.0][: 4 + include_raw]
        raw = [0.25, -1.0] if include_raw else []
        close(reference.fourier_features(x, 2, (6, 4), include_raw), x.new_tensor(raw + deepmind))
        close(
            reference.fourier_features(x, 2, (6, 4), include_raw, "perceiver-pytorch"), x.new_tensor(by_axis)
        )

    @pytest.mark.parametrize("resolution", [(224.0,), (224.0, 224.0), (16.0, 56.0, 130.0)])
    @pytest.mark.parametrize("bands", [1, 2, 64])
    @pytest.mark.parametrize("include_raw", [True, False])
    def test_equals_transformers(self, resolution: tuple[float, ...], bands: int, include_raw: bool) -> None:
        """Up to the last bit of an fp32 frequency, which shifts the phase by pi * f * eps."""
        x = randn(1, 40, len(resolution)).clamp(-1, 1)
        perceiver = pytest.importorskip("transformers.models.perceiver.modeling_perceiver")
        theirs = perceiver.generate_fourier_features(x, bands, resolution, concat_pos=include_raw)
        atol = math.pi * max(resolution) / 2 * torch.finfo(torch.float32).eps
        ours = reference.fourier_features(x, bands, resolution, include_raw)
        close(ours, theirs.reshape(ours.shape), rtol=0, atol=atol)

    def test_equals_perceiver_pytorch(self) -> None:
        x = randn(40, 3).clamp(-1, 1)
        perceiver = pytest.importorskip("perceiver_pytorch.perceiver_pytorch")
        theirs = perceiver.fourier_encode(x, 10.0, 6).flatten(-2)
        ours = reference.fourier_features(x, 6, (10.0,) * 3, True, "perceiver-pytorch")
        close(ours, theirs, rtol=0, atol=math.pi * 5 * torch.finfo(torch.float32).eps)

    def test_half_precision_coordinates_are_widened(self) -> None:
        x = randn(4, 2).half()
        assert reference.fourier_features(x, 3, (8, 8)).dtype == torch.float32

    @pytest.mark.parametrize("order", ["deepmind", "perceiver-pytorch"])
    def test_gradients(self, order: str) -> None:
        x = randn(3, 2, grad=True)
        assert gradcheck(lambda x: reference.fourier_features(x, 3, (6, 8), True, order), x)


class TestPackInputs:
    def test_hand_worked(self) -> None:
        content, position = (
            torch.tensor([[[1.0]]], dtype=torch.float64),
            torch.tensor([[3.0]], dtype=torch.float64),
        )
        packed, rstd = reference.pack_inputs(content, position, eps=0.5, channels_multiple=4)
        scale = 1 / math.sqrt(1.5)
        close(packed, content.new_tensor([[[-scale, scale, 0, 0]]]))
        close(rstd, content.new_tensor([[scale]]))

    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_equals_concatenation_and_layer_norm(self, batched: bool, normalize: bool) -> None:
        content = randn(2, 5, 9)
        positions = randn(2, 5, 4) if batched else randn(5, 4)
        packed, rstd = reference.pack_inputs(content, positions, normalize=normalize)
        x = torch.cat([content, positions.expand(2, 5, 4)], -1)
        assert packed.shape == (2, 5, 16)
        close(packed[..., :13], F.layer_norm(x, (13,)) if normalize else x)
        assert not packed[..., 13:].any()
        if normalize:
            close(rstd, (x.var(-1, correction=0) + 1e-5).rsqrt())
        else:
            assert rstd.shape == (0,)

    @pytest.mark.parametrize("order", ["deepmind", "perceiver-pytorch"])
    @pytest.mark.parametrize("include_raw", [True, False])
    def test_fourier_table_gives_fourier_features(self, order: str, include_raw: bool) -> None:
        """FourierPositions.table and fourier_features are two accounts of one thing."""
        x = randn(6, 3)
        positions = FourierPositions(5, (9.0, 16.0, 224.0), include_raw, order)
        packed, _ = reference.pack_inputs(x.new_zeros(2, 6, 0), x, positions.table(), normalize=False)
        features = reference.fourier_features(x, 5, positions.max_resolution, include_raw, order)
        close(packed[1, :, : positions.channels], features, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("C", "padded"), [(1, 16), (15, 16), (16, 16), (17, 32), (261, 272), (1024, 1024)]
    )
    def test_pads_to_a_multiple_of_16(self, C: int, padded: int) -> None:
        assert reference.pack_inputs(randn(1, 2, C))[0].shape == (1, 2, padded)

    def test_hidden_tokens_are_zero_whatever_they_hold(self) -> None:
        content, positions = randn(2, 5, 3), randn(2, 5, 2)
        mask = some_visible(2, 5)
        clean, clean_rstd = reference.pack_inputs(content, positions, key_mask=mask)
        dirty = content.masked_fill(~mask[..., None], NAN).requires_grad_()
        packed, rstd = reference.pack_inputs(
            dirty, positions.masked_fill(~mask[..., None], NAN), key_mask=mask
        )
        close(packed, clean, rtol=0, atol=0)
        close(rstd, clean_rstd, rtol=0, atol=0)
        assert not packed[~mask].any() and not rstd[~mask].any() and rstd[mask].all()
        (gradient,) = torch.autograd.grad(packed.sum() + packed.square().sum(), dirty)
        assert gradient.isfinite().all() and not gradient[~mask].any()

    def test_no_channel_of_content_and_no_token(self) -> None:
        assert reference.pack_inputs(randn(2, 3, 0), randn(3, 5))[0].shape == (2, 3, 16)
        assert reference.pack_inputs(randn(2, 0, 5))[0].shape == (2, 0, 16)

    def test_dtypes(self) -> None:
        packed, rstd = reference.pack_inputs(randn(2, 3, 5).bfloat16(), dtype=torch.float16)
        assert (packed.dtype, rstd.dtype) == (torch.float16, torch.float32)
        packed, rstd = reference.pack_inputs(randn(2, 3, 5))
        assert (packed.dtype, rstd.dtype) == (torch.float64, torch.float64)

    def test_gradients(self) -> None:
        tensors = randn(2, 3, 4, grad=True), randn(3, 2, grad=True)
        mask = some_visible(2, 3)
        assert gradcheck(lambda c, p: reference.pack_inputs(c, p, key_mask=mask), tensors)
        table = FourierPositions(2, (5.0, 6.0)).table()
        assert gradcheck(lambda c, p: reference.pack_inputs(c, p, table), tensors)

    def test_gradient_formula(self) -> None:
        """dcontent = rstd (dy - mean(dy) - x_hat mean(dy x_hat)), means over the C real channels."""
        content, dpacked = randn(2, 3, 4, grad=True), randn(2, 3, 16, seed=1)
        packed, rstd = reference.pack_inputs(content, randn(3, 2))
        (gradient,) = torch.autograd.grad(packed, content, dpacked)
        x_hat, dy = packed[..., :6], dpacked[..., :6]
        means = dy.mean(-1, keepdim=True) + x_hat * (dy * x_hat).mean(-1, keepdim=True)
        close(gradient, (rstd[..., None] * (dy - means))[..., :4])


class TestAttention:
    def test_hand_worked(self) -> None:
        """Scores log 3 and 0: weights 3/4 and 1/4, lse log 4."""
        q, k = torch.ones(1, 1, 1, 1).double(), torch.tensor([math.log(3), 0]).double().view(1, 1, 2, 1)
        out, lse = reference.attention(q, k, torch.tensor([8.0, 4.0]).double().view(1, 1, 2, 1))
        close((out.item(), lse.item()), (7.0, math.log(4)))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"scale": 0.3},
            {"causal": "upper_left"},
            {"attn_mask": randn(5, 7, seed=5)},
            {"attn_mask": randn(2, 1, 5, 7, seed=5)},
            {"attn_mask": some_visible(5, 7)},
            {"attn_mask": some_visible(2, 7)[:, None, None], "scale": 2.0},
        ],
        ids=lambda options: " ".join(options) or "plain",
    )
    @pytest.mark.parametrize("Lq", [1, 5, 7])
    def test_equals_sdpa(self, options: dict, Lq: int) -> None:
        q, k, v = qkv(Lq=Lq)
        options = dict(options)
        if options.get("attn_mask") is not None and options["attn_mask"].shape[-2] == 5:
            options = options | {"attn_mask": options["attn_mask"][..., :1, :].expand(2, 1, Lq, 7)}
        out, lse = reference.attention(q, k, v, **options)
        is_causal = options.pop("causal", "none") != "none"
        close(out, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options))
        assert lse.shape == (2, 3, Lq)

    def test_lse(self) -> None:
        q, k, v = qkv()
        close(reference.attention(q, k, v)[1], (q @ k.mT / 2).logsumexp(-1))

    @pytest.mark.parametrize("case", [*DECODE.values(), *PROCESS.values()], ids=lambda case: case.name)
    def test_families(self, case) -> None:
        case = case.scaled(max_length=128, max_heads=2)
        q, k, v = qkv(case.B, case.H, case.Lq, case.Lk, case.d_qk, case.d_v)
        close(reference.attention(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)])
    def test_ranks_two_to_five(self, leading: tuple[int, ...]) -> None:
        q, k, v = randn(*leading, 5, 4), randn(*leading, 7, 4, seed=1), randn(*leading, 7, 6, seed=2)
        close(reference.attention(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))
        assert reference.attention(q, k, v, dropout_p=0.5)[0].shape == (*leading, 5, 6)

    def test_grouped_queries(self) -> None:
        q, k, v = randn(2, 6, 5, 4), randn(2, 2, 7, 4), randn(2, 2, 7, 3)
        theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        close(reference.attention(q, k, v)[0], theirs)

    def test_broadcast_batch_and_head(self) -> None:
        q, k, v = randn(1, 3, 5, 4), randn(2, 1, 7, 4), randn(2, 1, 7, 6)
        theirs = F.scaled_dot_product_attention(*(t.expand(2, 3, -1, -1) for t in (q, k, v)))
        close(reference.attention(q, k, v)[0], theirs)

    @pytest.mark.parametrize("sizes", [{"Lk": 0}, {"Lq": 0}, {"B": 0}])
    def test_empty_axes(self, sizes: dict[str, int]) -> None:
        q, k, v = qkv(**sizes, grad=True)
        out, lse = reference.attention(q, k, v)
        assert out.shape == (*q.shape[:3], 6) and not out.any() and (lse == -math.inf).all()
        assert all(not g.any() for g in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))

    @pytest.mark.parametrize("kind", ["key_mask", "bool", "float"])
    def test_row_that_sees_nothing(self, kind: str) -> None:
        """Its output and every gradient are 0, its lse -inf; the other rows are as without it."""
        q, k, v = qkv(grad=True)
        visible = torch.ones(2, 1, 5, 7, dtype=torch.bool)
        visible[1, 0, 2:4] = False
        options: dict = {"attn_mask": visible}
        if kind == "key_mask":
            options = {"key_mask": torch.tensor([True, False])[:, None].expand(2, 7)}
            visible = options["key_mask"][:, None, None].expand(2, 1, 5, 7)
        if kind == "float":
            options = {"attn_mask": torch.zeros(2, 1, 5, 7).masked_fill(~visible, -math.inf).double()}
        out, lse = reference.attention(q, k, v, **options)
        full, full_lse = reference.attention(q, k, v)
        empty = (~visible.any(-1)).expand(2, 3, 5)
        assert not out[empty].any() and (lse[empty] == -math.inf).all()
        close(out[~empty], full[~empty])
        close(lse[~empty], full_lse[~empty])
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
        assert not dq[empty].any() and dk.isfinite().all() and dv.isfinite().all()
        # The lse of an empty row is a constant.
        (dq,) = torch.autograd.grad(reference.attention(q, k, v, **options)[1].nan_to_num().sum(), q)
        assert not dq[empty].any() and dq.isfinite().all()

    def test_row_masked_with_finfo_min_gives_the_mean(self) -> None:
        """transformers writes the smallest finite number; such a row sees every key alike."""
        q, k, v = (t.float() for t in qkv())
        mask = torch.full((5, 7), torch.finfo(torch.float32).min)
        close(reference.attention(q, k, v, attn_mask=mask)[0], v.mean(-2, keepdim=True).expand(-1, -1, 5, -1))

    def test_key_mask_hides_nan(self) -> None:
        mask = some_visible(2, 7)
        q, k, v = qkv()
        expected, expected_lse = reference.attention(q, k, v, attn_mask=mask[:, None, None])
        hidden = ~mask[:, None, :, None]
        q, k, v = (t.requires_grad_() for t in (q, k.masked_fill(hidden, NAN), v.masked_fill(hidden, NAN)))
        out, lse = reference.attention(q, k, v, key_mask=mask)
        close(out, expected)
        close(lse, expected_lse)
        gradients = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_key_mask_with_causal(self) -> None:
        mask = some_visible(2, 7)
        q, k, v = qkv()
        both = mask[:, None, None] & torch.ones(5, 7, dtype=torch.bool).tril()
        close(
            reference.attention(q, k, v, key_mask=mask, causal="upper_left")[0],
            reference.attention(q, k, v, attn_mask=both)[0],
        )

    @pytest.mark.parametrize(("Lq", "Lk"), [(5, 7), (7, 5), (5, 5)])
    def test_bottom_right_is_torchs_lower_right(self, Lq: int, Lk: int) -> None:
        q, k, v = qkv(Lq=Lq, Lk=Lk)
        found, lse = reference.attention(q, k, v, causal="bottom_right")
        close(found, F.scaled_dot_product_attention(q, k, v, torch.ones(Lq, Lk).tril(Lk - Lq).bool()))
        assert (lse == -torch.inf).sum() == 2 * 3 * max(Lq - Lk, 0)

    @pytest.mark.parametrize("causal", ["none", "upper_left", "bottom_right"])
    def test_packed_sequences_are_attended_to_one_by_one(self, causal: str) -> None:
        starts_q, starts_k = (torch.tensor(s, dtype=torch.int32) for s in ([0, 2, 2, 9, 12], [0, 4, 6, 6, 13]))
        q, k, v = qkv(B=1, Lq=12, Lk=13)
        found, _ = reference.attention(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=causal)
        for i in range(4):
            rows, keys = (slice(int(s[i]), int(s[i + 1])) for s in (starts_q, starts_k))
            alone, _ = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=causal)
            close(found[:, :, rows], alone)

    def test_hidden_queries_and_lengths(self) -> None:
        q, k, v = qkv()
        seen, lengths = torch.tensor([[True, False, True, True, False]] * 2), torch.tensor([3, 0], dtype=torch.int32)
        dense = seen[:, None, :, None] & (torch.arange(7) < lengths[:, None])[:, None, None]
        q = q.masked_fill(~seen[:, None, :, None], NAN)
        found, lse = reference.attention(q, k, v, query_mask=seen, lengths=lengths)
        close(found, reference.attention(q.nan_to_num(), k, v, attn_mask=dense)[0])
        assert torch.equal(lse == -torch.inf, ~dense.any(-1).expand(2, 3, 5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_rounds_as_eager_torch_does(self, dtype: torch.dtype) -> None:
        q, k, v = (t.to(dtype) for t in qkv(2, 2, 33, 65, 32, 24))
        out, lse = reference.attention(q, k, v)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        eager = torch.softmax((q @ k.mT) * 32**-0.5, -1) @ v
        oracle, oracle_lse = reference.attention(q.double(), k.double(), v.double())
        assert_as_accurate(out, eager, oracle, "out")
        assert_as_accurate(lse, (q @ k.mT * 32**-0.5).float().logsumexp(-1), oracle_lse, "lse")

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"key_mask": some_visible(1, 4)},
            {"causal": "upper_left"},
            {"dropout_p": 0.4, "dropout_seed": torch.tensor([5])},
        ],
        ids=lambda options: " ".join(options) or "plain",
    )
    def test_gradients(self, options: dict) -> None:
        tensors = qkv(1, 2, 3, 4, 2, 1, grad=True)
        assert gradcheck(lambda *t: reference.attention(*t, **options), tensors)
        assert gradgradcheck(lambda *t: reference.attention(*t, **options), tensors)

    def test_gradients_of_a_mask(self) -> None:
        q, k, v = qkv(1, 2, 3, 4, 2, 3)
        assert gradcheck(lambda m: reference.attention(q, k, v, attn_mask=m), randn(3, 4, grad=True))
