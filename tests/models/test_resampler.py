"""The Perceiver resampler: its equations written out, layouts of media, published sizes, training, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels import use_backend
from perceiver_kernels.models import PerceiverResampler, PerceiverResamplerConfig
from tests.modules import perturbed

B, T, FRAMES, M, D = 2, 3, 2, 7, 24

VARIANTS: dict[str, dict[str, Any]] = {
    "flamingo": {"max_media": 4},
    "frames": {"max_media": 4, "max_frames": 2},
    "idefics": {"activation": "relu", "qk_norm": "layer"},
    "idefics2": {"norm": "rms", "activation": "swiglu", "num_kv_heads": 2, "eps": 1e-6},
    "connector": {"norm": "rms", "activation": "swiglu", "num_kv_heads": 1, "input_dim": 10, "input_hidden_dim": 13},
    "ip-adapter": {"input_dim": 10, "output_dim": 14, "hidden_dim": 9},
}


def tiny(**changes: Any) -> PerceiverResamplerConfig:
    sizes: dict[str, Any] = {"dim": D, "num_latents": 5, "depth": 2, "num_heads": 4, "head_dim": 3}
    return PerceiverResamplerConfig(**{**sizes, **changes})


def randomised(config: PerceiverResamplerConfig, dtype: torch.dtype = torch.float64) -> PerceiverResampler:
    torch.manual_seed(0)
    return perturbed(PerceiverResampler(config, dtype=dtype))


def features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def visible(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:-1], count, -1).transpose(-3, -2)


def projected(model: PerceiverResampler, media: Tensor) -> Tensor:
    proj = model.input_proj
    if proj is None or isinstance(proj, nn.Linear):
        return media if proj is None else media @ proj.weight.T + proj.bias
    value, gate = (media @ proj.up_proj.weight.T).chunk(2, -1)
    return (value * F.silu(gate)) @ proj.down_proj.weight.T


def textbook(model: PerceiverResampler, media: Tensor, mask: Tensor | None) -> Tensor:
    """Media [B, T, F, M, C] and their mask, keys concatenated, heads repeated, norms and activations torch's."""
    config, x = model.config, projected(model, media)
    frames, length = media.shape[2:4]
    if model.frame_embedding is not None:
        x = x + model.frame_embedding[:frames].reshape(frames, 1, D)
    if model.media_embedding is not None:
        x = x + model.media_embedding[: media.shape[1]].reshape(-1, 1, 1, D)
    x = x.reshape(*media.shape[:2], frames * length, D)
    N = config.num_latents
    seen = torch.ones(*x.shape[:3], dtype=torch.bool) if mask is None else mask.reshape(x.shape[:3])
    seen = torch.cat((seen, torch.ones(*x.shape[:2], N, dtype=torch.bool)), -1)[:, :, None, None]  # [B, T, 1, 1, M + N]
    z = model.latents.expand(*x.shape[:2], N, D)
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        own = attention.norm(z)
        keys, values = attention.kv_proj(torch.cat((attention.norm_context(x), own), -2)).chunk(2, -1)
        query, key = heads(attention.q_proj(own), config.num_heads), heads(keys, config.kv_heads)
        if config.qk_norm is not None:
            query, key = attention.norm_query(query), attention.norm_key(key)
        key, value = (
            t.repeat_interleave(config.num_heads // config.kv_heads, -3) for t in (key, heads(values, config.kv_heads))
        )
        scores = (query @ key.mT / config.head_dim**0.5).masked_fill(~seen, -torch.inf)
        z = z + attention.out_proj((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))
        hidden = feed_forward.up_proj(feed_forward.norm(z))
        if config.activation == "swiglu":
            up, gate = hidden.chunk(2, -1)
            hidden = up * F.silu(gate)
        else:
            hidden = F.gelu(hidden) if config.activation == "gelu" else F.relu(hidden)
        z = z + feed_forward.down_proj(hidden)
    return model.norm(z if model.output_proj is None else model.output_proj(z))


def result_and_gradients(model: PerceiverResampler, media: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    media = media.clone().requires_grad_()
    out = run(media)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [media, *model.parameters()], upstream)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(tensor.abs().max().item() for tensor in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1024 * torch.finfo(e.dtype).eps * scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", VARIANTS)
def test_equals_the_equations_written_out(case: str, masked: bool) -> None:
    model = randomised(tiny(**VARIANTS[case]))
    media = features(B, T, FRAMES, M, model.config.media_dim)
    mask = visible(*media.shape[:-1]) if masked else None
    actual = result_and_gradients(model, media, lambda x: model(x, mask))
    assert_same(actual, result_and_gradients(model, media, lambda x: textbook(model, x, mask)))


def test_layouts_of_media() -> None:
    """Without axes, a medium is the first of its sequence and its tokens are the first frame's."""
    model = randomised(tiny(max_media=4, max_frames=3))
    media, mask = features(B, T, FRAMES, M, D), visible(B, T, FRAMES, M)
    video = model(media, mask)
    assert video.shape == (B, T, 5, D)
    with_one_frame = model(media[:, :, :1], mask[:, :, :1])
    torch.testing.assert_close(model(media[:, :, 0], mask[:, :, 0]), with_one_frame)
    image = model(media[:, 0, 0], mask[:, 0, 0])
    assert image.shape == (B, 5, D)
    torch.testing.assert_close(image, with_one_frame[:, 0])
    # The place in the sequence is seen, what stands at other places is not.
    assert not torch.allclose(model(media[:, 1:2])[:, 0], model(media)[:, 1])
    torch.testing.assert_close(model(media[:, :2]), model(media)[:, :2])


def test_what_a_mask_hides_changes_nothing() -> None:
    model, media = randomised(tiny()), features(B, M, D)
    mask = torch.arange(M).expand(B, -1) < 4
    torch.testing.assert_close(model(media, mask), model(media[:, :4]))
    changed = torch.where(mask[..., None], media, 1e3)
    assert torch.equal(model(changed, mask), model(media, mask))
    hidden = model(media, torch.zeros(B, M, dtype=torch.bool))
    torch.testing.assert_close(hidden, model(media[:, :0]))


@pytest.mark.parametrize("case", ["flamingo", "connector", "ip-adapter"])
def test_hidden_tokens_may_be_nan(case: str) -> None:
    """Their products with weights of zero would make every gradient of a projection NaN."""
    model = randomised(tiny(**VARIANTS[case]))
    media = features(B, M, model.config.media_dim)
    mask = torch.arange(M).expand(B, -1) < 4
    poisoned = torch.where(mask[..., None], media, torch.nan)
    expected = result_and_gradients(model, media, lambda x: model(x, mask))
    actual = result_and_gradients(model, poisoned, lambda x: model(x, mask))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", VARIANTS)
def test_flops_are_those_that_run(case: str) -> None:
    model = randomised(tiny(**VARIANTS[case]), torch.float32)
    media = features(B, T, FRAMES, M, model.config.media_dim, dtype=torch.float32)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(media)
    assert counter.get_total_flops() == model.flops(B * T, FRAMES * M)


@pytest.mark.parametrize(("case", "checkpointing"), [("frames", False), ("connector", True), ("ip-adapter", False)])
def test_compiles_whole(case: str, checkpointing: bool) -> None:
    torch.compiler.reset()
    model = randomised(tiny(**VARIANTS[case], activation_checkpointing=checkpointing))
    media = features(B, T, FRAMES, M, model.config.media_dim)
    mask = visible(*media.shape[:-1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = result_and_gradients(model, media, lambda x: compiled(x, mask))
    assert_same(actual, result_and_gradients(model, media, lambda x: model(x, mask)))


def test_checkpointing_computes_layers_twice_and_gives_the_same() -> None:
    whole, media, calls = randomised(tiny(attention_dropout=0.5)), features(B, M, D), []
    model = randomised(tiny(attention_dropout=0.5, activation_checkpointing=True))
    model.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    runs = []
    for each in (model, whole):
        torch.manual_seed(3)
        runs.append(result_and_gradients(each, media, each))
    assert all(torch.equal(a, e) for a, e in zip(*runs, strict=True))
    assert len(calls) == 2
    with torch.no_grad():
        model(media)
    assert len(calls) == 3


def test_attention_dropout_is_of_training_alone() -> None:
    model, media = randomised(tiny(attention_dropout=0.5)), features(B, M, D)
    assert not torch.equal(model(media), model(media))
    assert torch.equal(model.eval()(media), model(media))
    torch.testing.assert_close(model(media), randomised(tiny())(media))


@pytest.mark.parametrize("case", VARIANTS)
def test_autocast_runs_in_half_width_and_keeps_gradients_in_float32(case: str) -> None:
    model = randomised(tiny(**VARIANTS[case]), torch.float32)
    media = features(B, T, M, model.config.media_dim, dtype=torch.float32)
    ran = []
    model.layers[0].attention.q_proj.register_forward_hook(lambda module, inputs, out: ran.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(media)
        model(media.bfloat16())
    assert ran == [torch.bfloat16] * 2
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for name, p in model.named_parameters() if name != "frame_embedding")
    torch.testing.assert_close(out.float(), model(media), rtol=0.1, atol=0.3)


def test_published_sizes() -> None:
    """Of meta tensors: what the originals' own constructors give is compared where they are installed, in tests/convert."""
    sizes = {
        PerceiverResampler.flamingo: (1024, 64, 2, 8, 64, 4),
        PerceiverResampler.open_flamingo: (1024, 64, 6, 8, 64, None),
        PerceiverResampler.idefics: (1280, 64, 6, 16, 96, None),
        PerceiverResampler.idefics2: (4096, 64, 3, 16, 96, None),
        PerceiverResampler.ip_adapter_plus: (768, 16, 4, 12, 64, None),
        PerceiverResampler.ip_adapter_plus_sdxl: (1280, 16, 4, 20, 64, None),
    }
    for build, expected in sizes.items():
        model = build(device="meta", dtype=torch.bfloat16)
        config = model.config
        assert expected == (
            config.dim, config.num_latents, config.depth, config.num_heads, config.head_dim, config.max_media,
        )  # fmt: skip
        assert len(model.layers) == config.depth and model.latents.dtype == torch.bfloat16
        assert build(device="meta", depth=1, num_latents=3).latents.shape == (3, config.dim)
    # Per layer: two norms, q and out 2 D Hd, k and v 2 D Hd / 4, a norm and 3 x 4 D D; then latents and the last norm.
    D, width = 4096, 16 * 96
    assert PerceiverResampler.idefics2(device="meta").num_params() == 3 * (
        3 * D + 2 * D * width + 2 * D * width // 4 + 12 * D * D
    ) + 65 * D  # fmt: skip
    connector = PerceiverResampler.idefics2(device="meta", input_dim=1152, input_hidden_dim=14336)
    assert connector.num_params() - 2 * 1152 * 14336 - 14336 * D == PerceiverResampler.idefics2(device="meta").num_params()


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    wide = {"dim": 512, "depth": 1, "num_latents": 64}
    flamingo = PerceiverResampler.flamingo(**wide)
    assert abs(flamingo.latents.std() - 1) < 0.02 and abs(flamingo.media_embedding.std() - 1) < 0.05
    assert abs(flamingo.layers[0].attention.q_proj.weight.std() * 512**0.5 - 1) < 0.02
    idefics2 = PerceiverResampler.idefics2(**wide)
    assert (idefics2.latents == 1).all() and abs(idefics2.layers[0].feed_forward.up_proj.weight.std() - 0.02) < 1e-4
    ip_adapter = PerceiverResampler.ip_adapter_plus(**wide)
    assert abs(ip_adapter.latents.std() * 512**0.5 - 1) < 0.02 and (ip_adapter.input_proj.bias == 0).all()


def test_learns_a_batch() -> None:
    torch.manual_seed(0)
    model, head, media = PerceiverResampler(tiny(max_media=4)), nn.Linear(5 * D, 5), torch.randn(8, T, M, D)
    labels = torch.arange(8 * T) % 5
    optimiser = torch.optim.Adam([*model.parameters(), *head.parameters()], 5e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(head(model(media).flatten(0, 1).flatten(1)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"num_latents": 2.0}, TypeError, "num_latents must be an integer, got 2.0"),
        ({"depth": -1}, ValueError, "depth must be at least 0, got -1"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads=4, got 3"),
        ({"hidden_dim": "9"}, TypeError, "hidden_dim must be an integer, got '9'"),
        ({"max_media": 0}, ValueError, "max_media must be at least 1, got 0"),
        ({"max_frames": 1.5}, TypeError, "max_frames must be an integer, got 1.5"),
        ({"input_hidden_dim": 8}, ValueError, "input_dim must be given with input_hidden_dim=8, got None"),
        ({"output_dim": 0}, ValueError, "output_dim must be at least 1, got 0"),
        ({"activation": "tanh"}, ValueError, "activation must be one of 'gelu', .* got 'tanh'"),
        ({"norm": None}, ValueError, "norm must be one of 'layer', 'rms', got None"),
        ({"qk_norm": "l2"}, ValueError, "qk_norm must be one of 'layer', 'rms', got 'l2'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number, at least 0, got -1.0"),
        ({"attention_dropout": 1.0}, ValueError, r"attention_dropout must be in \[0, 1\), got 1.0"),
        ({"latent_init": "zeros"}, ValueError, "latent_init must be one of 'normal', 'scaled', 'ones', got 'zeros'"),
        ({"linear_std": 0.0}, ValueError, "linear_std must be a finite positive number, got 0.0"),
        ({"activation_checkpointing": 1}, TypeError, "activation_checkpointing must be a bool, got 1"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("media", "mask", "error", "message"),
    [
        ([1.0], None, TypeError, "media must be a torch.Tensor, got list"),
        (torch.zeros(M, D), None, ValueError, r"media must be \[B, M, C\], .* with C=24, got \(7, 24\)"),
        (torch.zeros(B, M, D + 1), None, ValueError, r"media must be .* with C=24, got \(2, 7, 25\)"),
        (torch.zeros(B, M, D).double(), None, TypeError, "media must have the parameters' dtype torch.float32 unless autocast"),
        (torch.zeros(B, 5, M, D), None, ValueError, r"media must have at most max_media=4 media, got 5: \(2, 5, 7, 24\)"),
        (torch.zeros(B, T, 4, M, D), None, ValueError, "media must have at most max_frames=3 frames, got 4"),
        (torch.zeros(B, M, D), [True], TypeError, r"mask must be a tensor \[B, M\] with B=2, M=7, got list"),
        (torch.zeros(B, M, D), torch.ones(B, M), TypeError, "mask must be bool, True = visible, got float32"),
        (
            torch.zeros(B, T, M, D), torch.ones(B, M, dtype=torch.bool), ValueError,
            r"mask must be \[B, T, M\] with B=2, T=3, M=7, got \(2, 7\)",
        ),
    ],
)  # fmt: skip
def test_wrong_media_are_named(media: Any, mask: Any, error: type[Exception], message: str) -> None:
    model = PerceiverResampler(tiny(max_media=4, max_frames=3))
    with pytest.raises(error, match=message):
        model(media, mask)
