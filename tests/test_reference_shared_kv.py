"""The specification of what encode adds: shared keys and values, dropout by counters, absorption."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from perceiver_kernels import reference
from perceiver_kernels.testing import EDGE, ENCODE, EncodeCase
from tests.test_reference import NAN, close, randn, some_visible


class TestSharedKVAttention:
    def test_hand_worked(self) -> None:
        """Scores log 3 and 0 over the values log 3 and 0: z = 3/4 log 3, lse = log 4."""
        x = torch.tensor([[[math.log(3)], [0.0]]], dtype=torch.float64)
        z, lse, rho = reference.shared_kv_attention(x.new_ones(1, 1, 1), x)
        close((z.item(), lse.item(), rho.item()), (0.75 * math.log(3), math.log(4), 1.0))

    @pytest.mark.parametrize("case", ENCODE.values(), ids=lambda case: case.name)
    def test_is_attention_with_equal_keys_and_values(self, case: EncodeCase) -> None:
        case = case.scaled(max_inputs=128, max_latents=16)
        q, x = randn(case.B, case.R, case.C) * case.C**-0.5, randn(case.B, case.M, case.C)
        z, _, rho = reference.shared_kv_attention(q, x)
        close(z, F.scaled_dot_product_attention(q, x, x, scale=1.0))
        assert (rho == 1).all()

    @pytest.mark.parametrize("case", EDGE.values(), ids=lambda case: case.name)
    def test_edges(self, case: EncodeCase) -> None:
        q, x = randn(case.B, case.R, case.C, grad=True), randn(case.B, case.M, case.C, grad=True)
        z, lse, rho = reference.shared_kv_attention(q, x, scale=0.25)
        assert z.shape == q.shape and lse.shape == rho.shape == q.shape[:2]
        close(lse, (0.25 * q @ x.mT).logsumexp(-1))
        assert (rho == (1 if case.M else 0)).all()
        gradients = torch.autograd.grad(z.square().sum(), (q, x))
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("hide", ["key_mask", "lengths", "both"])
    def test_hidden_tokens_do_not_exist(self, hide: str) -> None:
        """The result is that of the visible tokens alone, whatever the others hold; sequence 2 sees none."""
        q, x = randn(3, 4, 5), randn(3, 6, 5)
        mask, lengths = some_visible(3, 6), torch.tensor([6, 4, 0], dtype=torch.int32)
        mask[2] = False
        visible = {"key_mask": mask, "lengths": torch.arange(6) < lengths[:, None]}
        visible["both"] = visible["key_mask"] & visible["lengths"]
        options = {"key_mask": mask, "lengths": lengths}
        options = options if hide == "both" else {hide: options[hide]}
        dirty = x.masked_fill(~visible[hide][..., None], NAN).requires_grad_()
        z, lse, rho = reference.shared_kv_attention(q.requires_grad_(), dirty, **options)
        for b in range(2):
            alone = x[b : b + 1, visible[hide][b]]
            expected, expected_lse, _ = reference.shared_kv_attention(q[b : b + 1], alone)
            close(z[b : b + 1], expected)
            close(lse[b : b + 1], expected_lse)
        assert not z[2].any() and (lse[2] == -math.inf).all()
        close(rho, torch.tensor([1.0, 1, 0]).double()[:, None].expand(3, 4))
        dq, dx = torch.autograd.grad(z.square().sum(), (q, dirty))
        assert dq.isfinite().all() and not dq[2].any() and not dx[~visible[hide]].any()

    def test_order_of_keys_does_not_matter(self) -> None:
        q, x = randn(2, 3, 5), randn(2, 9, 5)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        for a, b in zip(
            reference.shared_kv_attention(q, x), reference.shared_kv_attention(q, x[:, order]), strict=True
        ):
            close(a, b)

    def test_shifted_scores_shift_only_the_lse(self) -> None:
        """A channel that is 1 in every key adds the query's value there to all of its scores."""
        q, x = randn(2, 3, 5), randn(2, 9, 5)
        x[..., 0] = 1
        shifted = q.clone()
        shifted[..., 0] += 2.5
        z, lse, _ = reference.shared_kv_attention(q, x)
        shifted_z, shifted_lse, _ = reference.shared_kv_attention(shifted, x)
        close(shifted_z, z)
        close(shifted_lse, lse + 2.5)

    def test_dtypes(self) -> None:
        z, lse, rho = reference.shared_kv_attention(randn(2, 3, 16).bfloat16(), randn(2, 9, 16).bfloat16())
        assert (z.dtype, lse.dtype, rho.dtype) == (torch.bfloat16, torch.float32, torch.float32)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_gradients(self, dropout_p: float) -> None:
        options = {"key_mask": some_visible(2, 5), "dropout_p": dropout_p, "dropout_seed": torch.tensor([3])}
        tensors = randn(2, 3, 4, grad=True), randn(2, 5, 4, grad=True)
        assert gradcheck(lambda *t: reference.shared_kv_attention(*t, scale=0.5, **options), tensors)
        assert gradgradcheck(lambda *t: reference.shared_kv_attention(*t, scale=0.5, **options)[0], tensors)

    def test_gradient_formulas(self) -> None:
        """ds = p (dz . x - delta), dq = ds X, dx = ds^T q + p^T dz, delta = z . dz - dlse."""
        q, x = randn(2, 3, 4, grad=True), randn(2, 5, 4, grad=True)
        z, lse, _ = reference.shared_kv_attention(q, x)
        dz, dlse = randn(2, 3, 4, seed=7), randn(2, 3, seed=8)
        dq, dx = torch.autograd.grad((z, lse), (q, x), (dz, dlse))
        p = (q @ x.mT - lse[..., None]).exp()
        ds = p * (dz @ x.mT - ((z * dz).sum(-1) - dlse)[..., None])
        close(dq, ds @ x)
        close(dx, ds.mT @ q + p.mT @ dz)


class TestDropout:
    @pytest.mark.parametrize(
        ("counter", "key", "words"),
        [
            ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
        ids=["zeros", "ones", "pi"],
    )
    def test_known_answers(self, counter, key, words) -> None:
        """The vectors that come with Random123 (Salmon et al., SC 2011)."""
        out = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert tuple(int(word) for word in out) == words

    def test_counter_and_key_are_laid_out_as_documented(self) -> None:
        seed = torch.tensor([(0x12345678 << 32) | 0x9ABCDEF0])
        keep = reference.dropout_keep(seed, 2, 3, 5, 0.5, key_offset=7)
        for b, r, j in ((0, 0, 0), (1, 0, 4), (0, 2, 3), (1, 2, 1)):
            counter = [torch.tensor(c) for c in (j + 7, r, b, 0)]
            word = reference.philox(counter, [torch.tensor(0x9ABCDEF0), torch.tensor(0x12345678)])[0]
            assert keep[b, r, j] == (word >= 2**31)
            for step in (0, 1):
                at_the_threshold = reference.dropout_keep(
                    seed, 2, 3, 5, (int(word) + step) / 2**32, key_offset=7
                )
                assert bool(at_the_threshold[b, r, j]) == (step == 0)

    def test_a_weight_is_known_by_its_place_alone(self) -> None:
        """Chunks, smaller batches and fewer rows draw the same bits; another word of the seed does not."""
        seed = torch.tensor([-5])
        keep = reference.dropout_keep(seed, 3, 4, 50, 0.3)
        assert torch.equal(keep[:2, :3, 20:45], reference.dropout_keep(seed, 2, 3, 25, 0.3, key_offset=20))
        for other in (-6, -5 ^ (1 << 40)):
            assert not torch.equal(keep, reference.dropout_keep(torch.tensor([other]), 3, 4, 50, 0.3))

    @pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
    def test_rate_and_independence(self, dropout_p: float) -> None:
        """Within five standard deviations, along every axis and for neighbours."""
        keep = reference.dropout_keep(torch.tensor([11]), 8, 64, 512, dropout_p).double() - (1 - dropout_p)
        sigma = math.sqrt(dropout_p * (1 - dropout_p))
        assert abs(keep.mean()) < 5 * sigma / math.sqrt(keep.numel())
        for axis in range(3):
            ahead, behind = (
                keep.narrow(axis, 1, keep.shape[axis] - 1),
                keep.narrow(axis, 0, keep.shape[axis] - 1),
            )
            assert abs((ahead * behind).mean()) < 5 * sigma**2 / math.sqrt(ahead.numel())

    def test_never_and_always(self) -> None:
        seed = torch.tensor([1])
        assert reference.dropout_keep(seed, 1, 2, 300, 0.0).all()
        assert not reference.dropout_keep(seed, 1, 2, 300, 1.0).any()
        z, _, rho = reference.shared_kv_attention(randn(1, 2, 3, grad=True), randn(1, 4, 3), dropout_p=1.0)
        z.sum().backward()
        assert not z.any() and not rho.any()

    def test_weights_are_kept_or_dropped_and_rescaled(self) -> None:
        q, x, seed = randn(2, 6, 5), randn(2, 9, 5), torch.tensor([3])
        z, lse, rho = reference.shared_kv_attention(q, x, dropout_p=0.4, dropout_seed=seed, key_offset=2)
        weights = (q @ x.mT).softmax(-1) * reference.dropout_keep(seed, 2, 6, 9, 0.4, key_offset=2) / 0.6
        close(z, weights @ x)
        close(rho, weights.sum(-1))
        close(lse, (q @ x.mT).logsumexp(-1))

    def test_heads_are_rows(self) -> None:
        """attention drops for head h, query i what shared_kv_attention drops for row h * N + i."""
        q, x, seed = randn(2, 3, 4, 5), randn(2, 9, 5), torch.tensor([3])
        shared = x[:, None].expand(2, 3, 9, 5)
        out, _ = reference.attention(q, shared, shared, scale=1.0, dropout_p=0.4, dropout_seed=seed)
        z, _, _ = reference.shared_kv_attention(q.flatten(1, 2), x, dropout_p=0.4, dropout_seed=seed)
        close(out.flatten(1, 2), z)

    def test_seed_comes_from_torchs_generator(self) -> None:
        q, x = randn(2, 3, 5), randn(2, 9, 5)
        results = []
        for state in (1, 1, 2):
            torch.manual_seed(state)
            results.append(reference.shared_kv_attention(q, x, dropout_p=0.5)[0])
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
        seeds = torch.cat([reference.draw_seed() for _ in range(64)])
        assert (
            seeds.dtype == torch.int64
            and seeds.unique().numel() == 64
            and (seeds < 0).any()
            and (seeds > 0).any()
        )


class TestInputCrossAttention:
    B, H, N, M, C, d_qk, d_v = 2, 3, 4, 7, 5, 2, 6

    def tensors(self, grad: bool = False) -> dict[str, Tensor]:
        H, C = self.H, self.C
        shapes = {
            "q": (self.B, H, self.N, self.d_qk), "inputs": (self.B, self.M, C), "w_k": (H * self.d_qk, C),
            "w_v": (H * self.d_v, C), "b_k": (H * self.d_qk,), "b_v": (H * self.d_v,),
            "norm_weight": (C,), "norm_bias": (C,),
        }  # fmt: skip
        return {name: randn(*shape, seed=i, grad=grad) for i, (name, shape) in enumerate(shapes.items())}

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("biases", [True, False])
    @pytest.mark.parametrize("masked", [True, False])
    def test_equals_torch_layers(self, normalize: bool, biases: bool, masked: bool) -> None:
        t = self.tensors()
        if not biases:
            t |= {"b_k": None, "b_v": None}
        if not normalize:
            t |= {"norm_weight": None, "norm_bias": None}
        mask = some_visible(self.B, self.M) if masked else None
        out = reference.input_cross_attention(**t, normalize=normalize, eps=1e-3, scale=0.7, key_mask=mask)
        y = (
            F.layer_norm(t["inputs"], (self.C,), t["norm_weight"], t["norm_bias"], 1e-3)
            if normalize
            else t["inputs"]
        )
        k = F.linear(y, t["w_k"], t["b_k"]).view(self.B, self.M, self.H, self.d_qk).transpose(1, 2)
        v = F.linear(y, t["w_v"], t["b_v"]).view(self.B, self.M, self.H, self.d_v).transpose(1, 2)
        attn_mask = None if mask is None else mask[:, None, None]
        close(out, F.scaled_dot_product_attention(t["q"], k, v, attn_mask, scale=0.7))

    def test_default_scale_and_shared_queries(self) -> None:
        t = self.tensors()
        t["q"] = t["q"][:1]
        out = reference.input_cross_attention(**t)
        expanded = t | {"q": t["q"].expand(self.B, -1, -1, -1)}
        close(out, reference.input_cross_attention(**expanded, scale=self.d_qk**-0.5))

    def test_lengths_hide_nan(self) -> None:
        t = self.tensors()
        lengths = torch.tensor([4, 0], dtype=torch.int32)
        expected = reference.input_cross_attention(**t | {"inputs": t["inputs"][:, :4]})
        t["inputs"][0, 4:] = NAN
        t["inputs"][1] = NAN
        out = reference.input_cross_attention(**t, lengths=lengths)
        close(out[0], expected[0])
        assert not out[1].any()

    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_absorption(self, dropout_p: float) -> None:
        """q' = scale g (W_k^T q) reads x_hat, and out = W_v (g z + b rho) + b_v rho."""
        t, mask, seed = self.tensors(), some_visible(self.B, self.M), torch.tensor([9])
        mask[1] = False
        dropout = {"dropout_p": dropout_p, "dropout_seed": seed}
        textbook = reference.input_cross_attention(**t, scale=0.7, key_mask=mask, **dropout)
        w_k, w_v = t["w_k"].view(self.H, self.d_qk, self.C), t["w_v"].view(self.H, self.d_v, self.C)
        absorbed = 0.7 * t["norm_weight"] * torch.einsum("bhnd,hdc->bhnc", t["q"], w_k)
        x_hat, _ = reference.pack_inputs(t["inputs"], key_mask=mask, channels_multiple=1)
        z, _, rho = reference.shared_kv_attention(absorbed.flatten(1, 2), x_hat, key_mask=mask, **dropout)
        z, rho = z.unflatten(1, (self.H, self.N)), rho.unflatten(1, (self.H, self.N))[..., None]
        y = t["norm_weight"] * z + t["norm_bias"] * rho
        out = torch.einsum("bhnc,hdc->bhnd", y, w_v) + t["b_v"].view(self.H, 1, self.d_v) * rho
        close(out, textbook)

    def test_key_bias_has_no_gradient(self) -> None:
        t = self.tensors(grad=True)
        (gradient,) = torch.autograd.grad(reference.input_cross_attention(**t).square().sum(), t["b_k"])
        close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_gradients(self, dropout_p: float) -> None:
        t = self.tensors(grad=True)
        options = {
            "key_mask": some_visible(self.B, self.M),
            "dropout_p": dropout_p,
            "dropout_seed": torch.tensor([9]),
        }

        def run(*tensors: Tensor) -> Tensor:
            return reference.input_cross_attention(**dict(zip(t, tensors, strict=True)), **options)

        assert gradcheck(run, tuple(t.values()))
