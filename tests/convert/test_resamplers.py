"""Resamplers of other libraries as ours: the same values and gradients, and weights that go there and back unchanged."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.convert.rules import Rule, to_ours, to_theirs
from perceiver_kernels.models import PerceiverResampler
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import perturbed

Call = Callable[[nn.Module, Tensor, "Tensor | None"], Tensor]

B, T, FRAMES, M, D = 2, 3, 2, 7, 24


def open_flamingo() -> types.ModuleType:
    """Its helpers alone, under their own name: the package itself imports a language model's dependencies."""
    name = "open_flamingo.src.helpers"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec("open_flamingo")
    helpers = Path(spec.submodule_search_locations[0]) / "src" / "helpers.py" if spec else None
    if helpers is None or not helpers.exists():
        pytest.skip("open_flamingo is not installed (pip install --no-deps open_flamingo)")
    pytest.importorskip("einops_exts", reason="open_flamingo's helpers need einops_exts")
    loader = importlib.util.spec_from_file_location(name, helpers)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    sys.modules[name] = module
    return module


def diffusers() -> types.ModuleType:
    return pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed (pip install --no-deps)")


def flamingo(depth: int = 2) -> nn.Module:
    library = pytest.importorskip("flamingo_pytorch", reason="flamingo-pytorch is not installed")
    return library.PerceiverResampler(dim=D, depth=depth, dim_head=5, heads=3, num_latents=4, num_media_embeds=3)


def of(**embeddings: int) -> nn.Module:
    return open_flamingo().PerceiverResampler(dim=D, depth=2, dim_head=5, heads=3, num_latents=4, **embeddings)


def idefics_config(qk_norm: bool, dim: int = D) -> Any:
    from transformers.models.idefics import configuration_idefics as library

    perceiver = library.IdeficsPerceiverConfig(qk_layer_norms_perceiver=qk_norm)
    return library.IdeficsConfig(perceiver_config=perceiver, vision_config=library.IdeficsVisionConfig(embed_dim=dim))


def idefics(qk_norm: bool) -> nn.Module:
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    return IdeficsPerceiverResampler(idefics_config(qk_norm), D, 2, 3, 5, 4)


def idefics2_config(**changes: Any) -> Any:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig

    sizes = {
        "hidden_size": D, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 5,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return Idefics2PerceiverConfig(**{**sizes, **changes})


def idefics2(**changes: Any) -> nn.Module:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    return Idefics2PerceiverResampler(idefics2_config(**changes))


def idefics2_connector() -> nn.Module:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    text = {"model_type": "mistral", "hidden_size": D, "intermediate_size": 31}
    return Idefics2Connector(
        Idefics2Config(text_config=text, vision_config={"hidden_size": 10}, perceiver_config=idefics2_config().to_dict())
    )


def ip_adapter(**changes: int) -> nn.Module:
    sizes = {
        "embed_dims": 10, "output_dims": 14, "hidden_dims": D, "depth": 2, "dim_head": 5, "heads": 3, "num_queries": 4,
    }  # fmt: skip
    return diffusers().IPAdapterPlusImageProjection(**{**sizes, **changes})


def rules_of_transformers(model: PerceiverResampler) -> list[Rule]:
    return convert.rules_of(model, "transformers")


@dataclass(frozen=True)
class Case:
    """A library's model and ours.

    Args:
        media: shape of the media.
        call: theirs of (model, media, mask).
        masked: whether theirs takes a mask.
    """

    theirs: Callable[[], nn.Module]
    ours: Callable[..., PerceiverResampler]
    rules: Callable[[PerceiverResampler], list[Rule]]
    media: tuple[int, ...]
    call: Call = lambda model, media, mask: model(media)
    masked: bool = False


def library(name: str) -> Callable[[PerceiverResampler], list[Rule]]:
    return lambda model: convert.rules_of(model, name)


def published(build: Callable[..., PerceiverResampler], **sizes: Any) -> Callable[..., PerceiverResampler]:
    """A published configuration, scaled down."""
    common: dict[str, Any] = {"dim": D, "depth": 2, "num_latents": 4, "num_heads": 3, "head_dim": 5}
    return lambda **changes: build(**{**common, **sizes, **changes})


IDEFICS2_SIZES: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
IP_SIZES: dict[str, Any] = {"input_dim": 10, "output_dim": 14}

CASES = {
    "flamingo-pytorch": Case(
        flamingo, published(PerceiverResampler.flamingo, max_media=3), library("flamingo_pytorch"), (B, T, M, D)
    ),
    "flamingo-pytorch, fewer media": Case(
        flamingo, published(PerceiverResampler.flamingo, max_media=3), library("flamingo_pytorch"), (B, 2, M, D)
    ),
    "flamingo-pytorch, one medium": Case(
        flamingo, published(PerceiverResampler.flamingo, max_media=3), library("flamingo_pytorch"), (B, M, D),
        lambda model, media, mask: model(media).squeeze(1),
    ),
    "open_flamingo": Case(
        of, published(PerceiverResampler.open_flamingo), library("open_flamingo"), (B, T, FRAMES, M, D)
    ),
    "open_flamingo, embeddings": Case(
        lambda: of(max_num_media=4, max_num_frames=3), published(PerceiverResampler.open_flamingo, max_media=4, max_frames=3),
        library("open_flamingo"), (B, T, FRAMES, M, D),
    ),
    "open_flamingo, frames": Case(
        lambda: of(max_num_frames=FRAMES), published(PerceiverResampler.open_flamingo, max_frames=FRAMES),
        library("open_flamingo"), (B, T, FRAMES, M, D),
    ),
    "idefics": Case(lambda: idefics(False), published(PerceiverResampler.idefics), rules_of_transformers, (B, M, D)),
    "idefics, qk norm": Case(
        lambda: idefics(True), published(PerceiverResampler.idefics, qk_norm="layer"), rules_of_transformers, (B, M, D)
    ),
    "idefics2": Case(
        idefics2, published(PerceiverResampler.idefics2, **IDEFICS2_SIZES), rules_of_transformers, (B, M, D),
        lambda model, media, mask: model(media, mask), masked=True,
    ),
    "idefics2, gelu": Case(
        lambda: idefics2(hidden_act="gelu", rms_norm_eps=1e-2, num_key_value_heads=4),
        published(PerceiverResampler.idefics2, num_heads=4, num_kv_heads=None, activation="geglu", eps=1e-2),
        rules_of_transformers, (B, M, D), lambda model, media, mask: model(media, mask), masked=True,
    ),
    "idefics2, connector": Case(
        idefics2_connector, published(PerceiverResampler.idefics2, input_dim=10, input_hidden_dim=31, **IDEFICS2_SIZES),
        rules_of_transformers, (B, M, 10), lambda model, media, mask: model(media, mask), masked=True,
    ),
    "diffusers": Case(
        ip_adapter, published(PerceiverResampler.ip_adapter_plus, **IP_SIZES), library("diffusers"), (B, M, 10)
    ),
}  # fmt: skip


def media_of(case: Case, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    """Media, and a mask that hides all of the second medium's tokens but the first two."""
    media = torch.randn(case.media, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.rand(case.media[:-1], generator=torch.Generator().manual_seed(seed + 1)) < 0.6 if case.masked else None
    if mask is not None:
        mask[1, :2], mask[1, 2:] = True, False
    return media, mask


def rms_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt())


@pytest.fixture
def norms_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """IDEFICS2's norm rounds to float32 whatever the dtype; as its definition says it, parity in float64 can be asked for."""
    from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm

    original = Idefics2RMSNorm.forward
    monkeypatch.setattr(
        Idefics2RMSNorm, "forward", lambda self, x: (rms_norm if x.dtype == torch.float64 else original)(self, x)
    )


def results(call: Callable[[], Tensor], media: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, dict[str, Tensor]]:
    out = call()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    gradients = torch.autograd.grad(out, [media, *parameters.values()], upstream)
    return out.detach(), {"media": gradients[0], **dict(zip(parameters, gradients[1:], strict=True))}


def result_of_theirs(
    case: Case, theirs: nn.Module, ours: PerceiverResampler, media: Tensor, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Its result, and its gradients under our names."""
    media = media.clone().requires_grad_()
    out, gradients = results(lambda: case.call(theirs, media, mask), media, dict(theirs.named_parameters()))
    read = gradients.pop("media")
    return out, {"media": read, **to_ours(case.rules(ours), gradients, ours.state_dict())}


def result_of_ours(ours: PerceiverResampler, media: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    media = media.clone().requires_grad_()
    return results(lambda: ours(media, mask), media, dict(ours.named_parameters()))


@pytest.mark.usefixtures("norms_in_double")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_theirs(name: str) -> None:
    case = CASES[name]
    theirs, ours = perturbed(case.theirs()).double(), case.ours(dtype=torch.float64)
    ours.load_state_dict(to_ours(case.rules(ours), theirs.state_dict(), ours.state_dict()))
    media, mask = media_of(case)
    out, gradients = result_of_ours(ours, media, mask)
    expected, expected_gradients = result_of_theirs(case, theirs, ours, media, mask)
    assert out.shape == expected.shape and gradients.keys() == expected_gradients.keys()
    for what, actual, wanted in [("result", out, expected), *((n, gradients[n], g) for n, g in expected_gradients.items())]:
        assert wanted.any(), what
        # A bias of keys shifts all scores of a row alike: its gradient is rounding of what the weight's gradient sums.
        scale = expected_gradients.get(what.replace("norm_key.bias", "norm_key.weight"), wanted).abs().max().item()
        atol = 1024 * torch.finfo(torch.float64).eps * scale
        torch.testing.assert_close(actual, wanted, rtol=0, atol=atol, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.usefixtures("norms_in_double")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["idefics2", "idefics2, connector", "diffusers", "open_flamingo"])
def test_is_as_accurate_as_theirs(name: str, dtype: torch.dtype) -> None:
    """Over many models: one may be right by luck. Gradients are compared in float64, where no model has luck."""
    case, compared = CASES[name], []
    for seed in range(12):
        theirs, ours = perturbed(case.theirs(), seed).to(dtype), case.ours(dtype=dtype)
        ours.load_state_dict(to_ours(case.rules(ours), theirs.state_dict(), ours.state_dict()))
        media, mask = media_of(case, seed)
        media = media.to(dtype)
        with torch.no_grad():
            actual, eager = ours(media, mask), case.call(theirs, media, mask)
            compared.append((actual, eager, case.call(theirs.double(), media.double(), mask)))
    assert_as_accurate(*(torch.stack(results) for results in zip(*compared, strict=True)), "result")


@pytest.mark.parametrize("name", CASES)
def test_weights_go_there_and_back(name: str) -> None:
    case = CASES[name]
    theirs, ours = perturbed(case.theirs()), case.ours()
    state, rules = theirs.state_dict(), case.rules(ours)
    converted = to_ours(rules, state, ours.state_dict())
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in ours.state_dict().items()}
    back = to_theirs(rules, converted)
    assert back.keys() == state.keys() and all(torch.equal(back[n], tensor) for n, tensor in state.items())
    written = to_theirs(rules, perturbed(ours, 1).state_dict())
    theirs.load_state_dict(written)
    again = to_ours(rules, theirs.state_dict(), ours.state_dict())
    assert all(torch.equal(again[n], tensor) for n, tensor in ours.state_dict().items())


def test_ip_adapters_file_is_read_by_diffusers_as_we_write_it() -> None:
    """diffusers' own reader of IP-Adapter's names makes of our file the module that we give it the weights for."""
    diffusers()
    unet = pytest.importorskip("diffusers.loaders.unet")
    ours = PerceiverResampler.ip_adapter_plus(dim=D, num_heads=2, num_latents=4, **IP_SIZES)
    perturbed(ours)
    written = {n: t.clone() for n, t in convert.to_library(ours, "ip_adapter").items()}
    read = unet.UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers(None, written, low_cpu_mem_usage=False)
    expected = convert.to_library(ours, "diffusers")
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in read.state_dict().items())
    media = torch.randn(B, M, 10)
    torch.testing.assert_close(ours(media), read(media), rtol=1e-4, atol=1e-4)
    copy = PerceiverResampler.ip_adapter_plus(dim=D, num_heads=2, num_latents=4, **IP_SIZES)
    convert.load(copy, written, "ip_adapter")
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in copy.state_dict().items())


@pytest.mark.parametrize("name", ["flamingo_pytorch", "open_flamingo", "ip_adapter", "diffusers"])
def test_files(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    case = {"flamingo_pytorch": "flamingo-pytorch", "ip_adapter": "diffusers"}.get(name, name)
    ours, copy = perturbed(CASES[case].ours()), CASES[case].ours()
    convert.save(ours, tmp_path / "model.safetensors", name)
    convert.load(copy, tmp_path / "model.safetensors", name)
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in copy.state_dict().items())


def test_published_sizes_are_theirs() -> None:
    """As many parameters as the original with its defaults, name by name of the same shape."""
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    library_flamingo = pytest.importorskip("flamingo_pytorch", reason="flamingo-pytorch is not installed")
    helpers, ip = open_flamingo(), diffusers().IPAdapterPlusImageProjection
    resampler = PerceiverResampler
    with torch.device("meta"):
        pairs = [
            (library_flamingo.PerceiverResampler(dim=1024, depth=2), resampler.flamingo(), library("flamingo_pytorch")),
            (helpers.PerceiverResampler(dim=1024), resampler.open_flamingo(), library("open_flamingo")),
            (
                IdeficsPerceiverResampler(idefics_config(True, 1280), 1280, 6, 16, 96, 64),
                resampler.idefics(qk_norm="layer"), rules_of_transformers,
            ),
            (Idefics2PerceiverResampler(Idefics2PerceiverConfig()), resampler.idefics2(), rules_of_transformers),
            (
                ip(embed_dims=1280, output_dims=768, hidden_dims=768, heads=12, num_queries=16),
                resampler.ip_adapter_plus(), library("diffusers"),
            ),
            (
                ip(embed_dims=1280, output_dims=2048, hidden_dims=1280, heads=20, num_queries=16),
                resampler.ip_adapter_plus_sdxl(), library("diffusers"),
            ),
        ]  # fmt: skip
        for theirs, ours, rules in pairs:
            shapes = {n: t.shape for n, t in to_theirs(rules(ours), ours.state_dict()).items()}
            assert shapes == {n: t.shape for n, t in theirs.state_dict().items()}
            assert ours.num_params() == sum(p.numel() for p in theirs.parameters())


def tiny(build: Callable[..., PerceiverResampler], **sizes: Any) -> Callable[[], PerceiverResampler]:
    return lambda: published(build, **sizes)(device="meta")


R = PerceiverResampler
REFUSED: list[tuple[str, Callable[[], PerceiverResampler], str]] = [
    ("flamingo_pytorch", tiny(R.open_flamingo), "max_media must be given for flamingo-pytorch's PerceiverResampler, got None"),
    ("flamingo_pytorch", tiny(R.flamingo, max_frames=2), "max_frames must be None for flamingo-pytorch's"),
    (
        "flamingo_pytorch",
        tiny(R.flamingo, activation="relu"),
        "activation must be 'gelu' for flamingo-pytorch's .*, got 'relu'",
    ),
    ("flamingo_pytorch", tiny(R.flamingo, norm="rms"), "norm must be 'layer' for flamingo-pytorch's .*, got 'rms'"),
    ("flamingo_pytorch", tiny(R.flamingo, eps=1e-6), "eps must be 1e-05 for flamingo-pytorch's .*, got 1e-06"),
    ("open_flamingo", tiny(R.open_flamingo, num_kv_heads=1), "num_kv_heads must be None or 3 for OpenFlamingo's .*, got 1"),
    ("open_flamingo", tiny(R.open_flamingo, qk_norm="layer"), "qk_norm must be None for OpenFlamingo's .*, got 'layer'"),
    ("open_flamingo", tiny(R.open_flamingo, input_dim=8), "input_dim must be None for OpenFlamingo's .*, got 8"),
    ("ip_adapter", tiny(R.ip_adapter_plus, input_hidden_dim=8), "input_hidden_dim must be None for IP-Adapter's .*, got 8"),
    ("ip_adapter", tiny(R.ip_adapter_plus, max_media=8), "max_media must be None for IP-Adapter's Resampler, got 8"),
    ("diffusers", tiny(R.ip_adapter_plus, output_dim=None), "output_dim must be given for diffusers' IPAdapterPlus"),
    ("diffusers", tiny(R.open_flamingo), "input_dim must be given for diffusers' IPAdapterPlusImageProjection, got None"),
    (
        "transformers",
        tiny(R.open_flamingo),
        "activation must be 'relu' for transformers' IdeficsPerceiverResampler, got 'gelu'",
    ),
    ("transformers", tiny(R.idefics, qk_norm="rms"), "qk_norm must be None or 'layer' for transformers' Idefics.*, got 'rms'"),
    ("transformers", tiny(R.idefics, hidden_dim=9), "hidden_dim must be None or 96 for transformers' Idefics.*, got 9"),
    ("transformers", tiny(R.idefics2, num_kv_heads=1, hidden_dim=9), "hidden_dim must be None or 96 for .*Idefics2.*, got 9"),
    (
        "transformers",
        tiny(R.idefics2, num_kv_heads=1, activation="relu"),
        "activation must be 'swiglu' or 'geglu' for .*'relu'",
    ),
    ("transformers", tiny(R.idefics2, num_kv_heads=1, input_dim=9), "input_hidden_dim must be given for .*Connector, got None"),
]


@pytest.mark.parametrize(("name", "build", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_what_a_library_has_no_model_for_is_refused(name: str, build: Callable[[], Any], message: str) -> None:
    rules = rules_of_transformers if name == "transformers" else library(name)
    with pytest.raises(ValueError, match=message):
        rules(build())


def test_the_norm_in_double_is_theirs() -> None:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2RMSNorm

    norm, x = perturbed(Idefics2RMSNorm(D, 1e-2)), torch.randn(B, D)
    torch.testing.assert_close(rms_norm(norm, x), norm(x))
