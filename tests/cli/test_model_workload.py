"""Whole models: every case beside its original at sizes for a CPU, what is judged, and what rates are of."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.cudagraph_trees import get_manager

from perceiver_kernels.cli import main, measure
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.model_workload import ModelWorkload
from perceiver_kernels.cli.models import DEFAULT_MODELS, MODELS, SAME, ModelCase
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.same_model import GridWorkload, workload
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.counting import summary
from perceiver_kernels.dispatch import candidates

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CALL = ["bench", "models", "--device", "cpu", "--seconds", "0.005"]


def small(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return workload(REGIMES["models"].sizes(name, CPU, None), CPU, dtype)


def gradients(work: Any) -> int:
    """How many there are in the models of a workload."""
    models = [model for model in vars(work).values() if isinstance(model, torch.nn.Module)]
    return sum(p.grad is not None for model in models for p in model.parameters())


class TestCases:
    def test_published_sizes_are_the_originals(self) -> None:
        shapes = {name: case.shape for name, case in MODELS.items()}
        assert shapes["imagenet-fourier-b8"] == {"B": 8, "N": 512, "D": 1024}
        assert shapes["language-b8"] == {"B": 8, "N": 256, "D": 1280}
        assert shapes["optical-flow"] == {"B": 1, "N": 2048, "D": 512}
        assert shapes["multimodal-part"] == {"B": 1, "N": 784, "D": 512}
        assert shapes["shape-decoder-129"] == {"B": 1, "Lq": 129**3, "N": 512, "D": 512}
        assert shapes["perceiver-ar-copy-b1"] == {"B": 1, "M": 131_072, "N": 1024, "D": 1024}
        assert shapes["rin-imagenet64-b32"] == {"B": 32, "M": 64, "C": 512, "N": 128, "D": 768}
        assert set(DEFAULT_MODELS) < set(MODELS)

    @pytest.mark.parametrize("name", ["imagenet-fourier-b8", "imagenet-learned-b8", "imagenet-conv-b8", "language-b8"])
    def test_ours_is_built_at_the_size_that_is_told(self, name: str) -> None:
        case = MODELS[name]
        model = case.build(device="meta")
        assert model.encoder.latents.shape[-2:] == (case.shape["N"], case.shape["D"])
        assert case.inputs().shape[0] == case.B

    def test_the_grid_decoder_is_built_at_the_size_that_is_told(self) -> None:
        config = MODELS["shape-decoder-257"].build(device="meta").config
        assert (config.num_latents, config.dim) == (512, 512)


    @pytest.mark.parametrize("case", [*SAME, *(case.scaled() for case in SAME)], ids=lambda case: case.title)
    def test_our_models_are_built_at_the_sizes_that_are_told(self, case: Any) -> None:
        config = case.build(device="meta").config
        sizes = {"N": getattr(config, "num_latents", None) or config.num_inducing, "D": getattr(config, "dim", None)}
        assert sizes["N"] == case.shape["N"] and (sizes["D"] or config.latent_dim) == case.shape["D"]
        inputs = case.inputs()
        tokens = inputs[0].shape[1] if len(inputs) == 1 else (config.image_size // config.patch_size) ** 2
        assert (inputs[0].shape[0], tokens) == (case.shape["B"], case.shape["M"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_ours_is_as_accurate_as_the_original(name: str, dtype: torch.dtype) -> None:
    if isinstance(MODELS[name], ModelCase):
        pytest.importorskip("transformers")
    work = small(name, dtype)
    peers = work.peers(None, compiled=False)
    for which in work.case.passes:
        calls = work.calls(which, peers)
        assert list(calls) == ["ours", work.original]
        verdicts = Gate(work).judge(which, work.results(which, calls))
        assert verdicts["ours"].failure is None and list(verdicts["ours"].errors) == work.names(which)
        assert verdicts[work.original].failure is None


@pytest.fixture(scope="module")
def work() -> ModelWorkload:
    pytest.importorskip("transformers")
    return small("language-b8")


class TestJudgement:
    @pytest.mark.parametrize(("which", "told"), [("forward", "out: "), ("training", "gradients: ")])
    def test_a_wrong_result_does_not_pass(self, work: ModelWorkload, which: str, told: str) -> None:
        right = work.ours(which)

        def wrong() -> Any:
            outputs = right()
            if which == "forward":
                return [1.001 * output for output in outputs]
            next(p for p in work.ours_model.parameters() if p.grad is not None).grad *= 1.5
            return outputs

        failure = Gate(work).judge(which, work.results(which, {"ours": wrong}))["ours"].failure
        assert failure is not None and failure.startswith(told)

    def test_shared_weights_have_their_gradient_once(self, work: ModelWorkload) -> None:
        """The embedding and the token head are one parameter, of which the original's state dict has two names."""
        _, ours = work.results("training", {"ours": work.ours("training")})["ours"]()
        _, theirs = work.specification("training", torch.float64)
        assert ours.numel() == sum(p.numel() for p in work.ours_model.parameters()) == theirs.numel()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)

    def test_flops_are_those_of_the_papers(self, work: ModelWorkload) -> None:
        counted = summary(work.ours_model, work.our_inputs).whole.flops
        assert work.flops("forward", "ours") == work.flops("forward", "transformers") == counted
        assert work.flops("training", "ours") == 3 * counted
        fewest, moved = work.least("forward")
        weights = 4 * sum(p.numel() for p in work.ours_model.parameters())
        assert 0 < fewest <= counted and moved == weights + 8 * work.our_inputs.numel()
        assert work.least("training")[1] == moved + weights

    def test_flops_of_a_grid_are_linear_in_its_points(self) -> None:
        work = small("shape-decoder-129")
        model = work.model

        class Decoder(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, latents: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
                return model.decode(latents, queries)

        assert isinstance(work, GridWorkload)
        assert work.flops("forward", "ours") == summary(Decoder(), work.latents, work.queries[:, :125]).whole.flops


@pytest.mark.parametrize("name", [case.name for case in SAME])
class TestSame:
    def test_every_part_has_its_share_of_the_result(self, name: str) -> None:
        """Nothing that a model starts at zero, and no norm at its end, leaves parts of it without a gradient to judge."""
        work = small(name)
        _, gradients = work.results("training", {"ours": work.ours("training")})["ours"]()
        parts = gradients.split([parameter.numel() for parameter in work.model.parameters()])
        # Biases of keys shift all scores of a row alike.
        blind = [n for (n, _), part in zip(work.model.named_parameters(), parts, strict=True) if not part.any()]
        assert all(n.endswith(("k_proj.bias", "previous.norm.weight")) for n in blind), blind

    @pytest.mark.parametrize("which", ["forward", "training"])
    def test_a_wrong_result_does_not_pass(self, name: str, which: str) -> None:
        work = small(name)
        right = work.ours(which)

        def wrong() -> Any:
            outputs = right()
            if which == "forward":
                return [1.001 * output for output in outputs]
            next(p for p in work.model.parameters() if p.grad is not None and p.grad.any()).grad *= 1.5
            return outputs

        assert Gate(work).judge(which, work.results(which, {"ours": wrong}))["ours"].failure is not None

    def test_rates(self, name: str) -> None:
        work = small(name)
        counted = summary(work.model, *work.inputs).whole.flops
        assert work.flops("training", "ours") == 3 * work.flops("forward", "sdpa") == 3 * counted > 0
        fewest, moved = work.least("forward")
        weights = sum(p.numel() * p.element_size() for p in work.model.parameters())
        assert 0 < fewest <= counted and moved > weights and work.least("training")[1] == moved + weights


def test_the_peer_is_the_model_over_pytorch() -> None:
    work, used = small("resampler-flamingo-b32"), []
    work.model.register_forward_hook(lambda *_: used.append(tuple(candidates("attention", None))))
    for call in work.calls("forward", [Peer("sdpa")]).values():
        call()
    assert used == [tuple(candidates("attention", None)), ("sdpa",)]


class TestMemory:
    @pytest.mark.parametrize("name", ["imagenet-fourier-b8", "set-transformer-modelnet40-b16"])
    def test_is_counted_from_before_a_step_left_its_gradients(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which a step lets go of first: where an earlier one's were there, the step seemed to take less by them."""
        made, left = [], []
        regime = REGIMES["models"]
        kept = dataclasses.replace(regime, workload=lambda *given: made.append(regime.workload(*given)) or made[-1])
        monkeypatch.setitem(REGIMES, "models", kept)
        monkeypatch.setattr(measure, "peak_extra_bytes", lambda *_: left.append(gradients(made[-1])) or 0)
        assert main([*CALL, "--case", name, "--passes", "training"]) == 0
        assert left == [0, 0]
        made[-1].ours("training")()
        assert gradients(made[-1]) > 0


class TestPeers:
    def test_a_compiled_peer_comes_with_ours_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers")
        monkeypatch.setattr(torch, "compile", lambda model, **_: model)
        work = small("imagenet-fourier-b8")
        assert work.peers(None, compiled=True) == [Peer("transformers"), Peer("transformers", compiled=True)]
        assert list(work.calls("forward", work.peers(None, compiled=True))) == [
            "ours", "transformers", "ours-compiled", "transformers-compiled"
        ]  # fmt: skip
        assert small("imagenet-conv-b8").peers(None, compiled=True) == [Peer("transformers")]

    @pytest.mark.gpu
    @pytest.mark.parametrize("which", ["forward", "training"])
    def test_compiled_models_are_graphs_with_the_same_results(self, which: str) -> None:
        pytest.importorskip("transformers")
        gpu = torch.device("cuda")
        work = workload(REGIMES["models"].sizes("imagenet-fourier-b8", CPU, None), gpu, torch.float32)
        calls = work.calls(which, work.peers(None, compiled=True))
        # What the original copies from the host cannot be captured.
        del calls["transformers-graphed"]
        for _ in range(3):
            for call in calls.values():
                call()
        verdicts = Gate(work).judge(which, work.results(which, calls))
        assert {name: verdict.failure for name, verdict in verdicts.items()} == {
            "ours": None, "ours-graphed": None, "transformers": None, "ours-compiled": None, "transformers-compiled": None
        }  # fmt: skip
        assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None
        torch.compiler.reset()

    @pytest.mark.parametrize(("name", "peer"), [("imagenet-conv-b8", "sdpa"), ("shape-decoder-129", "transformers")])
    def test_another_peer_is_a_reason(self, name: str, peer: str) -> None:
        pytest.importorskip("transformers")
        work = small(name)
        told = measure.attempt(work.calls("forward", [Peer.parse(peer)])[peer])
        assert told == f"{peer} has no such model: {name} is measured beside {work.original}"


class TestCommand:
    def test_rows(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        path = tmp_path / "models.json"
        call = [*CALL, "--case", "imagenet-fourier-b1", "shape-decoder-129", "--json", str(path)]
        assert main(call) == 0
        rows = json.loads(path.read_text())["rows"]
        # Neither of the two is trained.
        assert [(row["case"], row["pass"], row["implementation"]) for row in rows] == [
            (case, "forward", name)
            for case, peer in (("imagenet-fourier-b1", "transformers"), ("shape-decoder-129", "sdpa"))
            for name in ("ours", peer)
        ]
        for row in rows:
            assert (row["kind"], row["regime"], row["failure"]) == ("model", "models", None)
            assert row["p50_ms"] > 0 and row["tflops"] > 0 and row["gbytes_per_s"] > 0 and row["of_floor"] > 0
        told = "bench models --case imagenet-fourier-b1 --passes forward --device cpu --seconds 0.005 --peers transformers"
        assert rows[1]["command"].endswith(told)

    def test_models_beside_themselves(self, tmp_path: Path) -> None:
        path = tmp_path / "models.json"
        assert main([*CALL, "--case", *(case.name for case in SAME), "--json", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [(row["case"], row["pass"], row["implementation"]) for row in rows] == [
            (case.name, which, name) for case in SAME for which in ("forward", "training") for name in ("ours", "sdpa")
        ]
        for row in rows:
            assert row["failure"] is None and "inaccurate" not in row and row["p50_ms"] > 0 and row["of_floor"] > 0

    def test_without_transformers_a_row_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        path = tmp_path / "models.json"
        assert main([*CALL, "--case", "imagenet-fourier-b1", "shape-decoder-129", "--json", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert rows[0]["failure"].startswith("not installed: ") and rows[0]["implementation"] == "ours"
        assert rows[1]["failure"] is None

    @pytest.mark.parametrize(
        ("option", "told"),
        [
            (["--case", "imagenet-fourier"], "argument --case: no case named 'imagenet-fourier'; nearest: imagenet-fourier-b"),
            (["--max-inputs", "9"], "argument --max-inputs: models have no number of inputs to cut"),
            (["--sizes", "9"], "argument --sizes: must be given with one of encode, layers, decode, encode-kv, got models"),
        ],
    )
    def test_wrong_requests_are_one_line(self, option: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*CALL, *option]) == 2
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
