"""The Perceiver: published sizes, weight sharing, schedule, and the same result as the paper's equations written out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import perceiver_kernels
from perceiver_kernels import functional, reference
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import Perceiver, PerceiverConfig
from perceiver_kernels.nn import CrossBlock, LatentBlock, LearnedPositions
from perceiver_kernels.testing.accuracy import assert_as_accurate
from tests.modules import assert_same, perturbed, result_and_gradients

B, M, C = 2, 40, 13
IMAGENET_PIXELS = 224 * 224


def tiny(**changes: Any) -> PerceiverConfig:
    sizes: dict[str, Any] = {
        "input_dim": C, "num_classes": 5, "num_latents": 6, "latent_dim": 16, "num_cross_attends": 3, "num_blocks": 4,
        "layers_per_block": 2, "latent_heads": 4,
    }  # fmt: skip
    return PerceiverConfig(**{**sizes, **changes})


def randomised(config: PerceiverConfig, seed: int = 0) -> Perceiver:
    return perturbed(Perceiver(config), seed, 0.2)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, M, C, generator=torch.Generator().manual_seed(7)).to(dtype)


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def feed_forward(x: Tensor, layer: Any) -> Tensor:
    return x + layer.down_proj(F.gelu(layer.up_proj(norm(x, layer.norm))))


def cross_attend(z: Tensor, x: Tensor, block: CrossBlock, visible: Tensor | None) -> Tensor:
    layer = block.attention
    out = reference.input_cross_attention(
        layer.q_proj(norm(z, layer.norm_latents))[:, None], x, layer.k_proj.weight, layer.v_proj.weight,
        b_k=layer.k_proj.bias, b_v=layer.v_proj.bias, norm_weight=layer.norm_inputs.weight,
        norm_bias=layer.norm_inputs.bias, eps=layer.eps, key_mask=visible,
    )  # fmt: skip
    return feed_forward(z + layer.out_proj(out[:, 0]), block.feed_forward)


def transform(z: Tensor, block: LatentBlock) -> Tensor:
    layer = block.attention
    q, k, v = layer.qkv_proj(norm(z, layer.norm)).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out, _ = reference.attention(q, k, v)
    return feed_forward(z + layer.out_proj(out.transpose(1, 2).flatten(2)), block.feed_forward)


def textbook(model: Perceiver, x: Tensor, order: str, visible: Tensor | None = None) -> Tensor:
    """The model for ``order``, steps such as "C0 B0 C1 B0": cross-attend or latent block, and which weights."""
    z = model.latents.expand(x.shape[0], -1, -1)
    for step in order.split():
        if step[0] == "C":
            z = cross_attend(z, x, model.cross_blocks[int(step[1:])], visible)
        else:
            for block in model.latent_blocks[int(step[1:])]:
                z = transform(z, block)
    pooled = z.mean(1)
    return model.head(pooled if model.head_norm is None else norm(pooled, model.head_norm))


ORDERS = {
    "v2": (tiny(), "C0 B0 C1 B0 C1 B0 B0"),
    "v1": (tiny(weight_sharing="v1"), "C0 B0 C1 B1 C1 B1 B1"),
    "none": (tiny(weight_sharing="none"), "C0 B0 C1 B1 C2 B2 B3"),
    "leading": (tiny(cross_attends="leading", num_cross_attends=2), "C0 B0 C1 B0 B0 B0"),
    "start": (tiny(cross_attends="start"), "C0 C1 C1 B0 B0 B0 B0"),
    "every block": (tiny(num_cross_attends=4), "C0 B0 C1 B0 C1 B0 C1 B0"),
    "one cross-attend": (tiny(num_cross_attends=1), "C0 B0 B0 B0 B0"),
    "two cross-attends": (tiny(num_cross_attends=2, head_norm=True), "C0 B0 B0 C1 B0 B0"),
    "cross-attends all alike": (tiny(weight_sharing="v1", cross_weight_sharing="v2"), "C0 B0 C0 B1 C0 B1 B1"),
    "cross-attends of their own": (tiny(cross_weight_sharing="none"), "C0 B0 C1 B0 C2 B0 B0"),
    "cross-attends only": (tiny(num_blocks=0, cross_attends="start"), "C0 C1 C1"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_schedule(case: str) -> None:
    config, order = ORDERS[case]
    steps = [("cross" if step[0] == "C" else "block", int(step[1:])) for step in order.split()]
    assert list(config.schedule()) == steps


@pytest.mark.parametrize("method", ["absorbed", "projected"])
@pytest.mark.parametrize("case", ORDERS)
def test_equals_the_equations_written_out(case: str, method: str) -> None:
    """Logits and every gradient in fp64; shared weights collect theirs from all the places that use them."""
    config, order = ORDERS[case]
    model = randomised(replace(config, method=method)).double()
    visible = torch.rand(B, M, generator=torch.Generator().manual_seed(1)) < 0.7
    x = tokens(torch.float64).requires_grad_()
    actual = result_and_gradients(lambda x: model(x, visible), model, x)
    assert_same(actual, result_and_gradients(lambda x: textbook(model, x, order, visible), model, x), 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    """Over many models: a single one's few logits may be right by luck, in eager's bf16 or in ours."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (config, order), x, results = ORDERS["v2"], tokens(dtype).to(device), []
    for model in (randomised(config, seed).to(device, dtype) for seed in range(12)):
        with torch.no_grad():
            oracle = textbook(copy.deepcopy(model).double(), x.double(), order)
            results.append((model(x), textbook(model, x, order), oracle))
    assert_as_accurate(*(torch.stack(logits) for logits in zip(*results, strict=True)), "logits")


def test_weights_are_really_shared() -> None:
    for sharing, crosses, blocks in (("v2", 2, 1), ("v1", 2, 2), ("none", 3, 4)):
        model = Perceiver(tiny(weight_sharing=sharing))
        assert len(model.cross_blocks) == crosses and len(model.latent_blocks) == blocks
        calls: list[int] = []
        for module in (*model.cross_blocks, *model.latent_blocks):
            module.register_forward_hook(lambda module, *_, calls=calls: calls.append(id(module)))
        model(tokens())
        assert len(calls) == 7 and len(set(calls)) == crosses + blocks
        keys = model.state_dict()
        assert len(keys) == len(list(model.parameters())), "a shared parameter is listed once"


def test_state_dict_keys_are_stable() -> None:
    keys = set(Perceiver(tiny(head_norm=True)).state_dict())
    layers = {"attention.norm", "attention.qkv_proj", "attention.out_proj"}
    forward = {"feed_forward.norm", "feed_forward.up_proj", "feed_forward.down_proj"}
    cross = {f"attention.{name}" for name in ("norm_latents", "norm_inputs", "q_proj", "k_proj", "v_proj", "out_proj")}
    modules = {f"cross_blocks.{i}.{name}" for i in range(2) for name in cross | forward}
    modules |= {f"latent_blocks.0.{i}.{name}" for i in range(2) for name in layers | forward}
    modules |= {"head", "head_norm"}
    assert keys == {"latents"} | {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}


def test_inputs_are_packed_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[int] = []
    original = functional.pack_inputs

    def counting(*arguments: Any, **keywords: Any) -> Any:
        packs.append(1)
        return original(*arguments, **keywords)

    monkeypatch.setattr(functional, "pack_inputs", counting)
    Perceiver(tiny())(tokens())
    assert len(packs) == 1


def test_first_query_is_projected_once_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = functional.input_cross_attention

    def recording(q: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        rows.append(q.shape[0])
        return original(q, *arguments, **keywords)

    monkeypatch.setattr(functional, "input_cross_attention", recording)
    Perceiver(tiny())(tokens())
    assert rows == [1, B, B]


@pytest.mark.parametrize("chunk_size", [1, 16, M, 100])
def test_chunked_equals_whole(chunk_size: int) -> None:
    whole = randomised(tiny()).double()
    chunked = Perceiver(tiny(chunk_size=chunk_size), dtype=torch.float64)
    chunked.load_state_dict(whole.state_dict())
    lengths = torch.tensor([M, 9], dtype=torch.int32)
    x = tokens(torch.float64).requires_grad_()
    actual = result_and_gradients(lambda x: chunked(x, lengths=lengths), chunked, x)
    assert_same(actual, result_and_gradients(lambda x: whole(x, lengths=lengths), whole, x), 1024)


def test_lengths_mask_and_truncation_agree() -> None:
    model, x = randomised(tiny()), tokens()
    lengths = torch.tensor([17, 17], dtype=torch.int32)
    mask = (torch.arange(M) < 17).expand(B, -1)
    expected = model(x[:, :17])
    torch.testing.assert_close(model(x, lengths=lengths), expected)
    torch.testing.assert_close(model(x, mask), expected)
    torch.testing.assert_close(model(InputArray.tokens(x, key_mask=mask)), expected)
    torch.testing.assert_close(model(functional.pack_inputs(x, key_mask=mask)), expected)


def arrays() -> dict[str, InputArray]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (B, 3, 6, 5), generator=generator, dtype=torch.uint8)
    return {
        "image": InputArray.image(images, FourierPositions(3, (6.0, 5.0))),
        "uint8 normalised": InputArray(
            images.flatten(2).transpose(1, 2), FourierPositions(3, (6.0, 5.0)), grid=(6, 5), mean=(0.5,) * 3, std=(0.2,) * 3
        ),
        "video": InputArray.video(torch.randn(B, 4, 3, 6, 4), (2, 3, 2), FourierPositions(2, (2.0, 2.0, 2.0))),
        "audio": InputArray.audio(torch.randn(B, 64), 8, FourierPositions(3, (8.0,))),
        "points": InputArray.points(torch.rand(B, 30, 3) * 2 - 1, positions=FourierPositions(3, (20.0,) * 3)),
        "points with features": InputArray.points(
            torch.rand(B, 30, 3) * 2 - 1, torch.randn(B, 30, 2), FourierPositions(3, (20.0,) * 3)
        ),
        "tokens": InputArray.tokens(torch.randn(B, 12, 4), LearnedPositions(12, 6)()),
    }


@pytest.mark.parametrize("kind", arrays())
def test_every_kind_of_input(kind: str) -> None:
    """Whole and chunked, an InputArray reads as the plain tensor of its packed, un-normalised channels."""
    array = arrays()[kind]
    model = randomised(tiny(input_dim=array.channels))
    written_out = functional.pack_inputs(array, normalize=False, dtype=torch.float64).data[..., : array.channels]
    with torch.no_grad():
        logits = model(array)
        torch.testing.assert_close(logits, model(written_out.float()), rtol=1e-4, atol=1e-4)
        chunked = Perceiver(tiny(input_dim=array.channels, chunk_size=7))
        chunked.load_state_dict(model.state_dict())
        torch.testing.assert_close(chunked(array), logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_model_reads_uint8_and_float32() -> None:
    model = randomised(tiny(input_dim=17)).bfloat16()
    images = torch.randint(256, (B, 3, 6, 5), dtype=torch.uint8)
    positions = FourierPositions(3, (6.0, 5.0))
    from_bytes = model(InputArray.image(images, positions))
    from_floats = model(InputArray.image(images.float() / 255, positions))
    assert from_bytes.dtype == torch.bfloat16
    torch.testing.assert_close(from_bytes, from_floats, rtol=0.05, atol=0.05)


def test_autocast_runs_in_half_width_and_keeps_gradients_in_float32() -> None:
    model = randomised(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    logits.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(logits.float(), model(tokens()), rtol=0.1, atol=0.1)


def test_parameters_of_imagenet_are_the_papers() -> None:
    """Paper: 44.9M with shared weights, 326.2M without."""
    assert Perceiver.imagenet(device="meta").num_params() == 44_912_254
    assert Perceiver.imagenet(device="meta", weight_sharing="none").num_params() == 326_241_856


PAPER_GFLOPS = {1: 404.3, 2: 447.6, 4: 534.1, 8: 707.2}


@pytest.mark.parametrize("cross_attends", ["interleaved", "start"])
@pytest.mark.parametrize("count", PAPER_GFLOPS)
def test_flops_of_imagenet_are_the_papers(count: int, cross_attends: str) -> None:
    """Within 0.2 %: the paper's figure includes elementwise work, ours is the matrix products."""
    model = Perceiver.imagenet(device="meta", num_cross_attends=count, cross_attends=cross_attends)
    gflops = model.flops(1, IMAGENET_PIXELS) / 1e9
    assert 0.998 * PAPER_GFLOPS[count] < gflops < PAPER_GFLOPS[count]


def test_flops_of_one_more_cross_attend_are_the_papers() -> None:
    model = Perceiver.imagenet(device="meta")
    cross = model.cross_blocks[1].flops(1, 512, IMAGENET_PIXELS)
    assert abs(cross / 1e9 - 43.3) < 0.15
    only = Perceiver.imagenet(device="meta", num_blocks=0, cross_attends="start", weight_sharing="none")
    assert abs(only.flops(1, IMAGENET_PIXELS) / 1e9 - 346.1) < 0.7


def test_flops_stated_in_the_documentation() -> None:
    model = Perceiver.imagenet(device="meta")
    stated = {"projected": 706.3, "absorbed": 598.0}
    for method, gflops in stated.items():
        assert round(model.flops(1, IMAGENET_PIXELS, method=method) / 1e9, 1) == gflops
        assert str(gflops) in Perceiver.flops.__doc__


@pytest.mark.parametrize("method", ["absorbed", "projected"])
def test_flops_are_those_that_run(method: str) -> None:
    model = Perceiver(tiny(input_dim=16, method=method))
    with torch.no_grad(), perceiver_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.randn(B, M, 16))
    assert counter.get_total_flops() == model.flops(B, M, method=method)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Perceiver.imagenet, (261, 1000, 8, 8, 6, 2, 1)),
        (Perceiver.audioset, (487, 527, 2, 2, 8, 2, 2)),
        (Perceiver.modelnet40, (387, 40, 2, 2, 6, 2, 1)),
    ],
)
def test_published_models(build: Any, expected: tuple[int, ...]) -> None:
    model = build(device="meta")
    config = model.config
    assert (config.num_latents, config.latent_dim, config.cross_heads, config.latent_heads) == (512, 1024, 1, 8)
    assert expected == (
        config.input_dim, config.num_classes, config.num_cross_attends, config.num_blocks, config.layers_per_block,
        len(model.cross_blocks), len(model.latent_blocks),
    )  # fmt: skip
    assert build(device="meta", num_classes=3, num_latents=8).head.out_features == 3


def test_published_channels_are_those_of_the_default_positions() -> None:
    assert InputArray.image(torch.empty(1, 3, 224, 224, device="meta")).channels == 261
    assert InputArray.points(torch.empty(1, 2000, 3, device="meta")).channels == 387


def test_latents_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    latents = Perceiver(tiny(num_latents=256, latent_dim=512)).latents
    assert latents.shape == (1, 256, 512)
    assert abs(latents.std() - 0.02) < 2e-4 and abs(latents.mean()) < 3e-4


def test_learns_a_batch() -> None:
    torch.manual_seed(0)
    model, x = Perceiver(tiny()), torch.randn(8, M, C)
    labels = torch.arange(8) % 5
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_wrong_inputs_are_named() -> None:
    model = Perceiver(tiny())
    message = f"inputs must have input_dim={C} channels, content and positions together, got {C - 1}"
    with pytest.raises(ValueError, match=message):
        model(tokens()[..., :-1])
    with pytest.raises(TypeError, match="inputs must be a Tensor, InputArray or PackedInputs, got ndarray"):
        model(tokens().numpy())
    with pytest.raises(ValueError, match="inputs must be on cpu as the model, unless chunk_size is set, got meta"):
        model(tokens().to("meta"))
    with pytest.raises((TypeError, ValueError), match="key_mask"):
        model(tokens(), torch.ones(B, M - 1, dtype=torch.bool))
    mask = torch.ones(B, M, dtype=torch.bool)
    for config in (tiny(), tiny(chunk_size=7), tiny(input_dropout=0.5)):
        model = Perceiver(config)
        for inputs in (InputArray.tokens(tokens()), functional.pack_inputs(tokens())):
            with pytest.raises(ValueError, match="key_mask"):
                model(inputs, mask)
