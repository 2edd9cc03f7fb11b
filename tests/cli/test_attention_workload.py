"""Attention over given keys and values: what is called, what it is held against, and what its rates are of."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels as pk
from perceiver_kernels import dispatch
from perceiver_kernels.cli import gate, measure, textbook
from perceiver_kernels.cli.attention_workload import ATTENTION_PASSES, AttentionWorkload, flops, least_bytes
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.stock import LAYER_PEERS, Peer, peers_for
from perceiver_kernels.cli.subject import saved_gradients, shape_of
from perceiver_kernels.testing.cases import AttentionCase

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASE = AttentionCase("small", B=2, H=3, Lq=50, Lk=37, d_qk=12, d_v=20)


@pytest.fixture(scope="module")
def work() -> AttentionWorkload:
    return AttentionWorkload("decode", CASE, CPU, torch.float32)


class TestCalls:
    @pytest.mark.parametrize("peer", ["eager", "math", "math-pad8"])
    @pytest.mark.parametrize("which", ATTENTION_PASSES)
    def test_stock_computes_what_ours_computes(self, work: AttentionWorkload, which: str, peer: str) -> None:
        calls = work.calls(which, [Peer.parse(peer)])
        assert list(calls) == ["ours", peer]
        for mine, theirs in zip(calls["ours"](), calls[peer](), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    def test_forward_records_no_graph(self, work: AttentionWorkload) -> None:
        assert not work.ours("forward")()[0].requires_grad

    def test_a_backward_walks_the_graph_of_one_forward(self) -> None:
        """A compiled backward may take its saved tensors as scratch only where it runs once."""
        x, forwards = torch.ones(3, requires_grad=True), []

        def forward() -> torch.Tensor:
            forwards.append(functorch_config.donated_buffer)
            return x.exp()

        call = saved_gradients(forward, [x], torch.ones(3))
        assert torch.equal(call()[0], call()[0])
        assert forwards == [False]

    def test_the_row_of_triton_builds_a_graph_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A backward's backend is chosen when its graph is built: a graph of ours would be walked under Triton's name."""
        built = []

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            built.append(dispatch.candidates("attention", None))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        monkeypatch.setattr(pk, "attention", attention)
        monkeypatch.setattr(pk, "backends", lambda: {"triton": (True, "available")})
        monkeypatch.setattr(AttentionWorkload, "labels", lambda *_: {"backend": "cuda"})
        calls = AttentionWorkload("decode", CASE, CPU, torch.float32).calls("backward", [])
        for name in ("ours", "ours-triton"):
            calls[name]()
        assert built == [("cuda", "triton", "sdpa", "reference"), ("triton",)]

    def test_the_backend_is_that_of_the_automatic_choice(self, work: AttentionWorkload) -> None:
        assert work.labels("backward", "ours") == {"backend": "sdpa"}
        with pk.use_backend("reference"):
            assert work.labels("forward", "ours") == {"backend": "reference"}
        assert work.labels("forward", "math") == {"backend": "stock"}


MASKED = AttentionCase("causal", B=2, H=4, Lq=20, Lk=37, d_qk=12, d_v=12, H_kv=2, causal=True)


class TestCausalAndShared:
    """Causal cases, the last query sees all keys, and key heads that several heads share."""

    @staticmethod
    def expected(work: AttentionWorkload) -> tuple[torch.Tensor, ...]:
        case = work.case
        q, k, v = (tensor.detach().double().requires_grad_() for tensor in (work.q, work.k, work.v))
        mask = torch.ones(case.Lq, case.Lk, dtype=torch.bool).tril(case.Lk - case.Lq) if case.causal else None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), work.dout.double())

    @pytest.mark.parametrize("change", [{}, {"H_kv": None}, {"causal": False}, {"Lk": 20}], ids=str)
    @pytest.mark.parametrize("peer", ["ours", "eager", "math", "flash", "math-pad8"])
    def test_everybody_computes_the_same(self, peer: str, change: dict[str, Any]) -> None:
        work = AttentionWorkload("encode-kv", replace(MASKED, **change), CPU, torch.float32)
        calls = [work.ours(w) if peer == "ours" else work.stock(w, Peer.parse(peer)) for w in ATTENTION_PASSES]
        for mine, truth in zip([tensor for call in calls for tensor in call()], self.expected(work), strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_has_a_mask_of_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        monkeypatch.setattr("perceiver_kernels.cli.stock._flex_attention", lambda: flex_attention)
        work = AttentionWorkload("encode-kv", MASKED, CPU, torch.float32)
        (mine,) = work.stock("forward", Peer.parse("flex"))()
        torch.testing.assert_close(mine.double(), self.expected(work)[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [2**30, 2**9])
    def test_the_specification_in_parts_is_masked_as_a_whole(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        work = AttentionWorkload("encode-kv", MASKED, CPU, torch.float32)
        monkeypatch.setattr(textbook, "PART_BYTES", size)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            found = [tensor for which in ATTENTION_PASSES for tensor in work.specification(which, dtype)]
            for mine, truth in zip(found, self.expected(work), strict=True):
                torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=tolerance)

    def test_libraries_get_their_own_mask_or_refuse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[dict[str, Any]] = []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            given.append(options)
            return torch.zeros_like(q)

        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=attend))
        ops = SimpleNamespace(memory_efficient_attention=attend, LowerTriangularFromBottomRightMask=lambda: "mask")
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        wide = replace(MASKED, d_qk=320, d_v=320)
        monkeypatch.setitem(sys.modules, "ffpa_attn", SimpleNamespace(ffpa_attn_func=attend))

        def told(case: AttentionCase, peer: str) -> str | None:
            work = AttentionWorkload("encode-kv", case, CPU, torch.float32)
            return measure.attempt(work.stock("forward", Peer.parse(peer)))

        assert told(MASKED, "flash-attn") is None and given[-1]["causal"] is True
        assert told(replace(MASKED, H_kv=None), "xformers") is None and given[-1]["attn_bias"] == "mask"
        assert told(MASKED, "xformers") == "xformers wants a key head for each of 4 heads, got 2"
        assert told(wide, "ffpa") == "ffpa-attn is measured without a causal mask and without shared key heads"
        assert len(given) == 2

    def test_only_pairs_that_are_seen_count(self) -> None:
        seen = torch.ones(20, 37).tril(17).sum().item()
        assert flops(MASKED, "forward") == 2 * 2 * 4 * seen * 24
        assert least_bytes(MASKED, "forward", 2) == 2 * 2 * (4 * 20 * 24 + 2 * 37 * 24)

    def test_rows_say_so(self) -> None:
        assert shape_of(MASKED) == {
            "B": 2, "H": 4, "Lq": 20, "Lk": 37, "d_qk": 12, "d_v": 12, "H_kv": 2, "causal": True
        }  # fmt: skip
        assert set(shape_of(CASE)) == {"B", "H", "Lq", "Lk", "d_qk", "d_v"}
        title = AttentionWorkload("encode-kv", MASKED, CPU, torch.float32).title
        assert title == "causal: B=2, 4 heads of 12/12, 2 of keys, 20 queries over 37 keys, causal"


class TestPeers:
    def test_a_gpu_offers_flex_and_ffpa_beside_sdpa(self) -> None:
        work = AttentionWorkload("decode", CASE, CPU, torch.float32)
        assert {"eager", "math"} <= {peer.name for peer in work.peers(None, compiled=True)}
        work.device = torch.device("cuda")
        even = AttentionCase("even", B=1, H=1, Lq=1, Lk=1, d_qk=64, d_v=64)
        work.case = even
        names = ["flash", "cudnn", "efficient", "math", "flex", "ffpa", "xformers", "flash-attn", "compiled-eager"]
        assert [peer.name for peer in work.peers(None, compiled=True)] == names
        without = [name for name in names if name not in ("flex", "compiled-eager")]
        assert [peer.name for peer in work.peers(None, compiled=False)] == without

    def test_what_is_not_installed_is_one_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not one for each padding too."""
        found = {"xformers": object(), "ffpa_attn": None, "flash_attn": None}
        monkeypatch.setattr("importlib.util.find_spec", found.get)
        names = [peer.name for peer in peers_for(None, (261,), torch.device("cuda"), compiled=False, offered=LAYER_PEERS)]
        assert [name for name in names if name.startswith(("xformers", "ffpa", "flash-attn"))] == [
            "ffpa", "xformers", "flash-attn", "xformers-pad8"
        ]  # fmt: skip
        assert {"transformers", "perceiver-pytorch"} < set(names) and "transformers-pad8" not in names

    @pytest.mark.parametrize(
        ("peer", "module", "function", "scale"),
        [
            ("xformers", "xformers.ops", "memory_efficient_attention", "scale"),
            ("flash-attn", "flash_attn", "flash_attn_func", "softmax_scale"),
        ],
    )
    def test_libraries_are_called_in_their_layout(
        self, peer: str, module: str, function: str, scale: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """[B, L, H, d], and the scale by their name for it."""
        case = AttentionCase("plain", B=2, H=3, Lq=5, Lk=7, d_qk=16, d_v=16)
        work = AttentionWorkload("decode", case, CPU, torch.float32)
        shapes = []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: float) -> torch.Tensor:
            shapes.append((q.shape, k.shape))
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return Peer("eager").attend(q, k, v, options[scale]).transpose(1, 2)

        monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: attend}))
        for mine, theirs in zip(work.ours("backward")(), work.stock("backward", Peer.parse(peer))(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert shapes == [((2, 5, 3, 16), (2, 7, 3, 16))]
        monkeypatch.setitem(sys.modules, module, None)
        told = measure.attempt(work.stock("forward", Peer.parse(peer)))
        assert told is not None and told.startswith(f"{peer} cannot be imported: ")

    @pytest.mark.parametrize("peer", ["transformers", "perceiver-pytorch", "sdpa"])
    def test_layers_and_models_are_no_attention(self, work: AttentionWorkload, peer: str) -> None:
        told = measure.attempt(work.stock("forward", Peer.parse(peer)))
        assert told == f"{peer} has no attention over given queries, keys and values"

    def test_a_package_that_is_not_there_is_a_reason(
        self, work: AttentionWorkload, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ffpa_attn", None)
        told = measure.attempt(work.stock("forward", Peer.parse("ffpa")))
        assert told is not None and told.startswith("ffpa-attn cannot be imported: ")

    def test_ffpa_is_measured_where_its_own_kernels_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It hands narrower and wider heads to SDPA, which would be a peer under another's name."""
        given = []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
            given.append(scale)
            return Peer("eager").attend(q, k, v, scale)

        monkeypatch.setitem(sys.modules, "ffpa_attn", SimpleNamespace(ffpa_attn_func=attend))
        for width, served in ((256, False), (512, True), (1032, False)):
            case = AttentionCase("wide", B=1, H=1, Lq=4, Lk=4, d_qk=width, d_v=width)
            call = AttentionWorkload("decode", case, CPU, torch.float32).stock("backward", Peer.parse("ffpa"))
            told = measure.attempt(call)
            assert told is None if served else f"hands others to SDPA, got {width}" in str(told)
        assert given == [512**-0.5]

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_flex_is_flex_attention(self, work: AttentionWorkload, monkeypatch: pytest.MonkeyPatch) -> None:
        """Uncompiled here, as compiling takes many seconds."""
        from torch.nn.attention.flex_attention import flex_attention

        monkeypatch.setattr("perceiver_kernels.cli.stock._flex_attention", lambda: flex_attention)
        (mine,), (theirs,) = work.ours("forward")(), work.stock("forward", Peer.parse("flex"))()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class TestFlops:
    def test_forward_is_what_the_textbook_runs(self, work: AttentionWorkload) -> None:
        with FlopCounterMode(display=False) as counter:
            work.stock("forward", Peer("eager"))()
        assert counter.get_total_flops() == flops(CASE, "forward") == work.flops("forward", "ours")

    def test_backward_counts_the_scores_again(self, work: AttentionWorkload) -> None:
        call = work.stock("backward", Peer("eager"))
        call()
        with FlopCounterMode(display=False) as counter:
            call()
        recomputed = 2 * CASE.B * CASE.H * CASE.Lq * CASE.Lk * CASE.d_qk
        assert counter.get_total_flops() + recomputed == flops(CASE, "backward")

    def test_forward_costs_what_explain_predicts(self, work: AttentionWorkload) -> None:
        explained = pk.explain("attention", work.q, work.k, work.v)
        assert work.least("forward") == (explained.flops, explained.bytes)

    def test_backward_reads_dout_and_writes_gradients_too(self) -> None:
        operands = CASE.Lq * CASE.d_qk + CASE.Lk * (CASE.d_qk + CASE.d_v)
        elements = CASE.B * CASE.H * (2 * operands + CASE.Lq * CASE.d_v)
        assert least_bytes(CASE, "backward", 2) == 2 * elements


class TestGate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("which", ATTENTION_PASSES)
    def test_ours_passes(self, which: str, dtype: torch.dtype) -> None:
        work = AttentionWorkload("decode", CASE, CPU, dtype)
        verdict = Gate(work).judge(which, {"ours": work.ours(which)})["ours"]
        assert verdict.failure is None and list(verdict.errors) == work.names(which)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_key_whose_scores_have_no_gradient(self, dtype: torch.dtype) -> None:
        work = AttentionWorkload("decode", dataclasses.replace(CASE, Lk=1), CPU, dtype)
        assert Gate(work).judge("backward", {"ours": work.ours("backward")})["ours"].failure is None

    @pytest.mark.parametrize("which", ATTENTION_PASSES)
    def test_a_wrong_value_does_not(self, work: AttentionWorkload, which: str) -> None:
        def wrong() -> list[torch.Tensor]:
            tensors = [tensor.detach().clone() for tensor in work.ours(which)()]
            tensors[-1].view(-1)[0] += 1e-3 * tensors[-1].abs().max()
            return tensors

        failure = Gate(work).judge(which, {"ours": wrong})["ours"].failure
        assert failure is not None and failure.startswith(work.names(which)[-1])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("which", ATTENTION_PASSES)
    def test_streaming_over_rows_changes_nothing(
        self, work: AttentionWorkload, which: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The specification and the textbook in parts of a few rows are the whole ones."""
        whole = work.specification(which, dtype)
        monkeypatch.setattr(textbook, "PART_BYTES", 2**15)
        assert textbook._rows(work.q, work.k, work.v.to(dtype)) < CASE.Lq
        monkeypatch.setattr(gate, "PIECE_ELEMENTS", 100)
        for name, a, b in zip(work.names(which), whole, work.specification(which, dtype), strict=True):
            assert a.dtype == b.dtype == dtype, name
            torch.testing.assert_close(a, b, rtol=1e4 * torch.finfo(dtype).eps, atol=1e2 * torch.finfo(dtype).eps)

    def test_the_specification_is_autograd_of_attention(self, work: AttentionWorkload) -> None:
        q, k, v = (tensor.double().requires_grad_() for tensor in (work.q, work.k, work.v))
        out = pk.reference.attention(q, k, v)[0]
        expected = torch.autograd.grad(out, (q, k, v), work.dout.double())
        torch.testing.assert_close(work.specification("forward", torch.float64)[0], out.detach())
        for mine, theirs in zip(work.specification("backward", torch.float64), expected, strict=True):
            torch.testing.assert_close(mine, theirs)


class TestRegimes:
    @pytest.mark.parametrize("name", ["decode", "process", "encode-kv"])
    def test_cases_become_workloads_of_their_regime(self, name: str) -> None:
        regime = REGIMES[name]
        assert set(regime.default_cases) <= set(regime.cases)
        sizes = regime.sizes(regime.default_cases[0], CPU, 8)
        work = regime.workload(sizes, CPU, torch.float32)
        assert work.regime == name and max(sizes.Lq, sizes.Lk) <= 8
        assert work.title.startswith(f"{regime.default_cases[0]}: B=")

    def test_a_gpu_measures_the_sizes_as_they_are(self) -> None:
        regime, gpu = REGIMES["decode"], torch.device("cuda")
        assert regime.sizes("flow", gpu, None) == regime.cases["flow"]
        assert regime.sizes("flow", gpu, 4096).Lq == 4096 and regime.sizes("flow", gpu, 4096).Lk == 2048

    def test_long_cases_are_measured_when_they_are_named(self) -> None:
        decode = REGIMES["decode"]
        assert decode.default_cases == ("decode-h8", "decode-h1", "decode-262k", "flow", "vecset")
        assert {"shape2vecset", "multimodal"} <= set(decode.cases)
