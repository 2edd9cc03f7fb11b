"""What only a GPU shows: published sizes, graphs, streams, offsets past 2^31 in real memory, large grids, run-to-run bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import perceiver_kernels as pk
from perceiver_kernels import reference
from perceiver_kernels.dispatch import load
from perceiver_kernels.ops import pack as pack_op
from perceiver_kernels.ops import shared_kv as op
from perceiver_kernels.problem import SharedKVProblem, pad_channels
from perceiver_kernels.testing import ENCODE, EncodeCase, assert_as_accurate, runs_that_differ, same_bits
from perceiver_kernels.testing.targets import Target, only

pytestmark = pytest.mark.gpu

OP = "shared_kv_attention"
PARTIAL = True
RUNS = {"cuda": 1000, "triton": 50}
CHUNK = 8192


def wanted(target: Target) -> bool:
    return target.is_kernel and target.dtype == torch.bfloat16


@dataclass
class Data:
    """Packed inputs of a case on the GPU; q and dz are drawn so that attention is spread over many tokens."""

    q: Tensor
    x: Tensor
    dz: Tensor
    scale: float

    @classmethod
    def of(cls, case: EncodeCase, dtype: torch.dtype) -> Data:
        generator = torch.Generator("cuda").manual_seed(case.C)

        def randn(rows: int) -> Tensor:
            full = torch.randn(case.B, rows, case.C_padded, generator=generator, device="cuda", dtype=dtype)
            full[..., case.C :] = 0
            return full

        return cls(randn(case.R), randn(case.M), randn(case.R), case.C**-0.5)

    def run(self, target: Target) -> dict[str, Tensor]:
        self.skip_if_refused(target)
        q, x = self.q.detach().requires_grad_(), self.x.detach().requires_grad_()
        passes = target.passes_of(SharedKVProblem.of(q, x, None, None, self.scale, 0.0, True))
        z, lse, _ = op.shared_kv_attention(q, x, None, None, None, self.scale, 0.0, passes)
        dq, dx = torch.autograd.grad(z, (q, x), self.dz)
        return {"z": z.detach(), "lse": lse.detach(), "dq": dq, "dx": dx}

    def skip_if_refused(self, target: Target, dropout_p: float = 0.0) -> None:
        problem = SharedKVProblem.of(self.q, self.x, None, None, self.scale, dropout_p, True)
        if reasons := target.refusals(problem):
            pytest.skip(f"{target.backend}: {'; '.join(reasons)}")

    def eager(self) -> dict[str, Tensor]:
        q, x = self.q.detach().requires_grad_(), self.x.detach().requires_grad_()
        z, lse, _ = reference.shared_kv_attention(q, x, scale=self.scale)
        dq, dx = torch.autograd.grad(z, (q, x), self.dz)
        return {"z": z.detach(), "lse": lse.detach(), "dq": dq, "dx": dx}

    def oracle(self, keys: Tensor) -> dict[str, Tensor]:
        """fp64, chunk by chunk along the tokens; dx of the chosen ``keys`` alone."""
        q, dz = self.q.double(), self.dz.double()
        chunks = [self.x[:, start : start + CHUNK] for start in range(0, self.x.shape[1], CHUNK)]
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
        for chunk in chunks:
            lse = torch.logaddexp(lse, (self.scale * q @ chunk.double().mT).logsumexp(-1))
        z = torch.zeros_like(q)
        for chunk in chunks:
            x = chunk.double()
            z += (self.scale * q @ x.mT - lse[..., None]).exp_() @ x
        delta, dq = (dz * z).sum(-1, keepdim=True), torch.zeros_like(q)
        for chunk in chunks:
            x = chunk.double()
            p = (self.scale * q @ x.mT - lse[..., None]).exp_()
            dq += self.scale * (p * (dz @ x.mT - delta)) @ x
        x = self.x[:, keys].double()
        p = (self.scale * q @ x.mT - lse[..., None]).exp_()
        ds = self.scale * p * (dz @ x.mT - delta)
        return {"z": z, "lse": lse, "dq": dq, "dx": ds.mT @ q + p.mT @ dz}


def judge(target: Target, data: Data) -> None:
    data.skip_if_refused(target)
    keys = torch.randperm(data.x.shape[1], device="cuda")[:2048].sort().values
    actual, oracle, eager = data.run(target), data.oracle(keys), data.eager()
    for name, value in actual.items():
        pick = (lambda t: t[:, keys]) if name == "dx" else (lambda t: t)
        assert_as_accurate(pick(value), pick(eager[name]), oracle[name], f"{target} {name}")


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ["imagenet", "flow", "multimodal"])
def test_published_sizes(target: Target, name: str) -> None:
    judge(target, Data.of(ENCODE[name], target.dtype))


def test_published_size_in_float32(target: Target) -> None:
    judge(target, Data.of(replace(ENCODE["imagenet"], B=2), torch.float32))


@pytest.mark.parametrize("name", ["imagenet", "multimodal"])
def test_float16(target: Target, name: str) -> None:
    judge(target, Data.of(ENCODE[name].scaled(max_inputs=4096, max_latents=128, max_batch=2), torch.float16))


@pytest.mark.parametrize(("M", "R"), [(999, 77), (1001, 128), (1021, 129), (1000, 1)])
@pytest.mark.parametrize("C", [261, 451])
def test_odd_sizes(target: Target, C: int, M: int, R: int) -> None:
    judge(target, Data.of(EncodeCase("odd", B=3, M=M, C=C, N=R, D=8, H=1, d_qk=8, d_v=8), target.dtype))


@pytest.mark.parametrize("name", ["imagenet", "multimodal"])
def test_fifty_runs_give_the_same_bits(target: Target, name: str) -> None:
    """Splits meet in a fixed order and nothing is added atomically; other work on the GPU shifts when programs run."""
    data = Data.of(replace(ENCODE[name], B=2, M=ENCODE[name].M // 4), target.dtype)
    first, noise = data.run(target), torch.randn(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            noise @ noise
        again = data.run(target)
        assert [key for key in first if not same_bits(first[key], again[key])] == []


@pytest.mark.parametrize("C", [64, 128, 250, 261, 322, 400])
def test_many_forwards_give_the_same_bits(target: Target, C: int) -> None:
    """Every width of the CUDA C++ kernels, whose barriers are explicit, beside other work that shifts when blocks run."""
    data = Data.of(EncodeCase("bits", B=2, M=6000, C=C, N=256, D=8, H=1, d_qk=8, d_v=8), target.dtype)
    mask = torch.rand(2, 6000, device="cuda") < 0.9

    def run() -> list[Tensor]:
        options = (None, data.scale, 0.0, 0, None, None, None, None, target.backend)
        return [t for hidden in (None, mask) for t in op.FORWARD(data.q, data.x, hidden, None, *options)[:2]]

    _, different = runs_that_differ(run, RUNS[target.backend])
    assert different == [0, 0, 0, 0], "z and lse, without and with a mask, differed in so many runs"


@pytest.mark.parametrize("C", [40, 261, 700])
def test_many_packs_give_the_same_bits(target: Target, C: int) -> None:
    content = torch.randn(2, 6000, C, device="cuda", dtype=target.dtype)
    dpacked = torch.randn(2, 6000, pad_channels(C), device="cuda", dtype=target.dtype)
    options, module = {"normalize": True, "dtype": target.dtype}, load("pack_inputs", target.backend)

    def run() -> list[Tensor]:
        packed, rstd = module.pack_inputs_forward(content, None, None, None, eps=1e-5, **options)
        dcontent = module.pack_inputs_backward(dpacked, packed, rstd, content_channels=C, channels=C, **options)
        return [packed, rstd, dcontent]

    _, different = runs_that_differ(run, RUNS[target.backend])
    assert different == [0, 0, 0], "packed, rstd and dcontent differed in so many runs"


@pytest.mark.parametrize("C", [64, 128, 250, 261, 322])
def test_many_backwards_give_the_same_bits(target: Target, C: int) -> None:
    data = Data.of(EncodeCase("bits", B=2, M=6000, C=C, N=256, D=8, H=1, d_qk=8, d_v=8), target.dtype)
    forward = op.FORWARD(data.q, data.x, None, None, None, data.scale, 0.0, 0, None, None, None, torch.float32, target.backend)
    delta = op.DELTA(data.dz, forward[0], None, None, forward[2], target.backend)

    def run() -> list[Tensor]:
        operands = (data.dz, delta, None, data.q, data.x, forward[1], None, None, None)
        return list(op.BACKWARD(*operands, data.scale, 0.0, 0, True, True, target.backend))

    _, different = runs_that_differ(run, RUNS[target.backend])
    assert different == [0, 0], "dq and dx differed in so many runs"


class TestGraphs:
    @pytest.mark.parametrize("C", [272, 464])
    def test_replay_reads_new_inputs(self, target: Target, C: int) -> None:
        """Captured once, forward and backward; replayed after the inputs changed in place, it is the eager result."""
        case = EncodeCase("graph", B=2, M=3000, C=C, N=130, D=8, H=1, d_qk=8, d_v=8)
        static = Data.of(case, target.dtype)
        static.skip_if_refused(target)
        q, x = static.q.requires_grad_(), static.x.requires_grad_()

        def step() -> tuple[Tensor, ...]:
            with pk.use_backend(*target.passes):
                packed = pk.pack_inputs(x)
                z, lse = pk.shared_kv_attention(q, packed, scale=static.scale, return_lse=True)
            return z, lse, *torch.autograd.grad(z, (q, x), static.dz)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (1, 2):
            with torch.no_grad():
                torch.manual_seed(seed)
                q.normal_()
                x.normal_()
            graph.replay()
            found = [value.clone() for value in captured]
            assert all(same_bits(a, b) for a, b in zip(found, step(), strict=True))

    def test_dropout_draws_anew_at_every_replay(self, target: Target) -> None:
        data = Data.of(EncodeCase("graph", B=1, M=1000, C=64, N=64, D=8, H=1, d_qk=8, d_v=8), target.dtype)
        data.skip_if_refused(target, dropout_p=0.5)

        def step() -> Tensor:
            return pk.shared_kv_attention(data.q, data.x, dropout_p=0.5, scale=data.scale, backend=target.backend)

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        graph.replay()
        first = out.clone()
        graph.replay()
        assert first.isfinite().all() and not torch.equal(first, out)


def test_other_streams(target: Target) -> None:
    """The inputs are written late on the same stream: a launch elsewhere would read what was there before."""
    data = Data.of(EncodeCase("stream", B=2, M=5000, C=261, N=256, D=8, H=1, d_qk=8, d_v=8), target.dtype)
    expected = data.run(target)
    late = Data(
        torch.full_like(data.q, float("nan")), torch.full_like(data.x, float("nan")), torch.zeros_like(data.dz), data.scale
    )
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name in ("q", "x", "dz"):
            getattr(late, name).copy_(getattr(data, name))
        found = late.run(target)
    stream.synchronize()
    assert all(same_bits(found[key], expected[key]) for key in expected)


class TestLarge:
    def test_inputs_of_more_than_two_to_the_31_elements(self, target: Target) -> None:
        """The last batch entry lies past 2^31 elements of x and of dx."""
        B, M, C = 3, 2_700_000, 272
        assert (B - 1) * M * C < 2**31 < B * M * C
        x = torch.empty(B, M, C, device="cuda", dtype=target.dtype)
        for entry in x:
            entry.normal_()
        q, dz = (torch.randn(B, 16, C, device="cuda", dtype=target.dtype) for _ in range(2))
        found = Data(q, x, dz, C**-0.5).run(target)
        tail = Data(q[2:], x[2:], dz[2:], C**-0.5)
        keys = torch.arange(M - 2048, M, device="cuda")
        oracle, eager = tail.oracle(keys), tail.eager()
        for name, value in found.items():
            pick = (lambda t: t[:, keys]) if name == "dx" else (lambda t: t)
            assert_as_accurate(pick(value[2:]), pick(eager[name]), oracle[name], name)

    def test_packed_rows_past_two_to_the_31_elements(self, target: Target) -> None:
        B, M = 3, 2_700_000
        content = torch.empty(B, M, 261, device="cuda", dtype=target.dtype)
        for entry in content:
            entry.normal_()
        packed, rstd = pack_op.PACK_FORWARD(content, None, None, None, True, 1e-5, target.dtype, "triton")
        tail = slice(M - 512, M)
        expected, _ = reference.pack_inputs(content[2:, tail].double())
        eager, _ = reference.pack_inputs(content[2:, tail])
        assert_as_accurate(packed[2:, tail], eager, expected, "packed")
        dcontent = pack_op.PACK_BACKWARD(packed, packed, rstd, 261, 261, True, target.dtype, "triton")
        one = pack_op.PACK_BACKWARD(
            packed[2:, tail], packed[2:, tail], rstd[2:, tail].contiguous(), 261, 261, True, target.dtype, "triton"
        )
        assert same_bits(dcontent[2:, tail], one)

    def test_batches_past_65535(self, target: Target) -> None:
        """Every grid dimension but the first ends there; a launch beyond it fails, or does nothing."""
        B = 70_000
        q, x = (torch.randn(B, rows, 32, device="cuda", dtype=target.dtype).requires_grad_() for rows in (2, 5))
        with pk.use_backend(*target.passes):
            packed = pk.pack_inputs(x)
            z = pk.shared_kv_attention(q, packed, scale=0.2)
        dq, dx = torch.autograd.grad(z.float().sum(), (q, x))
        ends = slice(B - 3, B)
        q_end, x_end = q[ends].detach().requires_grad_(), x[ends].detach().requires_grad_()
        with pk.use_backend(*target.passes):
            z_end = pk.shared_kv_attention(q_end, pk.pack_inputs(x_end), scale=0.2)
        found = torch.autograd.grad(z_end.float().sum(), (q_end, x_end))
        for whole, part in zip((z, dq, dx), (z_end, *found), strict=True):
            torch.testing.assert_close(whole[ends], part)

    def test_many_tokens_of_one_sequence(self, target: Target) -> None:
        """More tiles along the tokens than a grid dimension but the first could count."""
        data = Data.of(EncodeCase("long", B=1, M=9_000_001, C=16, N=3, D=8, H=1, d_qk=8, d_v=8), target.dtype)
        judge(target, data)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_chunks_need_memory_for_one_chunk(target: Target, where: str) -> None:
    """Ten times the tokens, in host or device memory: the same peak beside the inputs, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    q, w_k, w_v = (
        torch.randn(size, generator=generator).to("cuda", target.dtype).requires_grad_()
        for size in ((1, 1, 256, 64), (64, 261), (64, 261))
    )
    peaks, results = [], []
    # The first run is not measured: cuBLAS takes a workspace of 32 MiB for each thread from the same allocator.
    for tokens in (50_176, 50_176, 501_760):
        pixels = torch.randint(0, 256, (1, 3, tokens // 224, 224), dtype=torch.uint8, generator=generator)
        raw = pk.InputArray.image(pixels.to(where))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with pk.use_backend(*target.passes):
            out = pk.input_cross_attention(q, raw, w_k, w_v, chunk_size=16_384)
        torch.autograd.grad(out.float().sum(), (q, w_k, w_v))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append(out)
    assert all(out.isfinite().all() for out in results)
    assert peaks[2] <= 1.05 * peaks[1] <= 64 << 20


@pytest.mark.parametrize("name", ["language", "resampler"])
def test_states_of_wide_chunks_at_full_size(target: Target, name: str) -> None:
    """Many heads over 768 and 1,024 channels in ragged chunks: the same bits each time, and the rows of the whole."""
    data = Data.of(ENCODE[name], target.dtype)
    data.skip_if_refused(target)

    def chunked() -> tuple[Tensor, ...]:
        state: tuple[Any, Any, Any] = (None, None, None)
        for start in range(0, data.x.shape[1], 384):
            x = data.x[:, start : start + 384].contiguous()
            state = op.FORWARD(
                data.q, x, None, None, None, data.scale, 0.0, start, *state, torch.float32, target.backend
            )
        return state

    first, second = chunked(), chunked()
    assert [same_bits(a, b) for a, b in zip(first, second, strict=True)] == [True] * 3
    whole, _, _ = reference.shared_kv_attention(data.q[:2].float(), data.x[:2].float(), scale=data.scale)
    error = (first[0][:2] - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert error.max() <= 0.02


@only(torch.bfloat16)
def test_autocast_with_parameters_in_float32(target: Target) -> None:
    q, x = (
        torch.randn(1, 2, 64, 32, device="cuda", requires_grad=True),
        torch.randn(2, 3000, 261, device="cuda", requires_grad=True),
    )
    w_k, w_v = (torch.randn(64, 261, device="cuda", requires_grad=True) for _ in range(2))
    with torch.autocast("cuda", torch.bfloat16), pk.use_backend(*target.passes):
        out = pk.input_cross_attention(q, x, w_k * 0.06, w_v * 0.06, method="absorbed")
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), (q, x, w_k, w_v))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    exact = pk.input_cross_attention(q, x, w_k * 0.06, w_v * 0.06, method="absorbed", backend="reference")
    assert (out.float() - exact).norm() <= 0.02 * exact.norm()
