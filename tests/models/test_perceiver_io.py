"""Perceiver IO: published sizes, parts as written out, deviations of its two sources, training, errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_kernels import use_backend
from perceiver_kernels.inputs import FourierPositions, InputArray
from perceiver_kernels.models import EncoderConfig, PerceiverEncoder, PerceiverIO, flow_patches
from perceiver_kernels.models.heads import ClassHead, Source
from perceiver_kernels.models.multimodal import CommonWidth, MultimodalPreprocessor, written_out
from perceiver_kernels.models.preprocessing import (
    ConvPreprocessor,
    LabelPreprocessor,
    PixelPreprocessor,
    PointPreprocessor,
    TextPreprocessor,
)
from perceiver_kernels.models.queries import FourierQueries, InputQueries, LearnedQueries
from perceiver_kernels.nn import OutputBlock

TINY: dict[str, Any] = {
    "num_latents": 6, "latent_dim": 16, "num_blocks": 2, "layers_per_block": 2, "latent_heads": 4,
}  # fmt: skip
TINY_TEXT: dict[str, Any] = {
    **TINY, "vocab_size": 20, "channels": 24, "max_length": 12, "cross_heads": 4, "qk_channels": 8, "v_channels": 16,
    "latent_qk_channels": 8, "latent_v_channels": 16, "decoder_heads": 4, "decoder_qk_channels": 8,
}  # fmt: skip
MODELS: dict[str, tuple[Callable[..., PerceiverIO], Callable[[], Any]]] = {
    "fourier": (lambda **c: PerceiverIO.imagenet_fourier(num_classes=5, **TINY | c), lambda: torch.randn(2, 3, 7, 6)),
    "learned": (
        lambda **c: PerceiverIO.imagenet_learned(image_size=6, num_classes=5, **TINY | c), lambda: torch.randn(2, 3, 6, 6)
    ),
    "conv": (lambda **c: PerceiverIO.imagenet_conv(num_classes=5, **TINY | c), lambda: torch.randn(2, 3, 20, 18)),
    "language": (lambda **c: PerceiverIO.language(**TINY_TEXT | c), lambda: torch.randint(0, 20, (2, 9))),
    "flow": (lambda **c: PerceiverIO.optical_flow(size=(4, 5), **TINY | c), lambda: torch.randn(2, 2, 27, 4, 5)),
    "multimodal": (
        lambda **c: PerceiverIO.multimodal(
            frames=2, image_size=8, samples_per_frame=8, samples_per_patch=4, num_classes=5, hidden_channels=12,
            label_query_channels=30, **TINY | c,
        ),
        lambda: {"image": torch.randn(2, 2, 3, 8, 8), "audio": torch.randn(2, 16, 1), "label": torch.rand(2, 5)},
    ),
}  # fmt: skip

# Models of other sources, which do not have two.
OTHERS: dict[str, tuple[Callable[..., PerceiverIO], Callable[[], Any]]] = {
    "perceiver-pytorch language": (
        lambda **c: PerceiverIO.perceiver_pytorch_lm(
            **{**TINY, "vocab_size": 20, "channels": 24, "max_length": 12, "layers_per_block": 1, "qk_channels": 8,
               "latent_qk_channels": 12, "decoder_feed_forward": True, **c}
        ),
        lambda: torch.randint(0, 20, (2, 9)),
    ),
    "mnist": (
        lambda **c: PerceiverIO.mnist(
            image_size=(7, 6), num_bands=3, query_channels=12, decoder_heads=2, **{**TINY, "attention_dropout": 0.0, **c}
        ),
        lambda: torch.randn(2, 1, 7, 6),
    ),
}  # fmt: skip


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs[name] for name in sorted(outputs)] if isinstance(outputs, dict) else [outputs]


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (PerceiverIO.imagenet_fourier, 48.4), (PerceiverIO.imagenet_learned, 62.3), (PerceiverIO.imagenet_conv, 48.6),
        (PerceiverIO.language, 201.1), (PerceiverIO.optical_flow, 41.1), (PerceiverIO.multimodal, 19.9),
    ],
)  # fmt: skip
def test_published_sizes(build: Callable[..., PerceiverIO], millions: float) -> None:
    """The paper's table but for flow (it prints 27.9 there), and 20.0 for multimodal."""
    assert round(build(device="meta").num_params() / 1e6, 1) == millions


def test_multimodal_tokens_and_queries_are_those_of_the_code() -> None:
    model = PerceiverIO.multimodal(device="meta", dtype=torch.float32)
    media = {
        "image": torch.empty(1, 16, 3, 224, 224), "audio": torch.empty(1, 30_720, 1), "label": torch.empty(1, 700)
    }  # fmt: skip
    lengths = {name: part(media[name]) for name, part in model.preprocessor.modalities.items()}
    tokens = [array.length if isinstance(array, InputArray) else array.shape[1] for array in lengths.values()]
    assert tokens == [1920, 50_176, 1] and sum(tokens) == 52_097
    assert (model.preprocessor.channels, model.queries.channels) == (704, 1026)
    assert 1920 + 16 * 224 * 224 + 1 == 804_737


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
class TestEveryModel:
    def test_trains(self, name: str) -> None:
        """All has a gradient but key biases, which softmax cancels, and what the masks of modalities leave unread."""
        build, inputs = (MODELS | OTHERS)[name]
        torch.manual_seed(0)
        model = build(attention_dropout=0.1, dropout=0.1)
        sum(tensor.square().mean() for tensor in tensors(model(inputs()))).backward()
        without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        unread = {"preprocessor.common.padding.label", "preprocessor.mask_tokens.audio", "preprocessor.mask_tokens.image"}
        assert all(n.endswith("k_proj.bias") for n in without - unread), without

    def test_checkpointing_gives_the_same_gradients(self, name: str) -> None:
        build, inputs = (MODELS | OTHERS)[name]
        torch.manual_seed(0)
        model, raw = build(), inputs()
        kept = build(activation_checkpointing=True)
        kept.load_state_dict(model.state_dict())
        runs: list[int] = []
        kept.decoder.register_forward_pre_hook(lambda *_: runs.append(1))
        for each in (model, kept):
            sum(tensor.square().mean() for tensor in tensors(each(raw))).backward()
        assert len(runs) == 2
        for (key, p), q in zip(model.named_parameters(), kept.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")

    def test_compiles_as_one_graph(self, name: str) -> None:
        build, inputs = (MODELS | OTHERS)[name]
        torch.manual_seed(0)
        model, raw = build(layers_per_block=1).eval(), inputs()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for a, e in zip(tensors(compiled(raw)), tensors(model(raw)), strict=True):
            torch.testing.assert_close(a, e)

    def test_autocast(self, name: str) -> None:
        build, inputs = (MODELS | OTHERS)[name]
        torch.manual_seed(0)
        model, raw = build().eval(), inputs()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = tensors(model(raw))
        # Ten roundings to bfloat16 of all that there is; single numbers are as wrong as a CPU's products make them.
        for a, e in zip(outputs, tensors(model(raw)), strict=True):
            assert (a.float() - e).norm() <= 10 * 2**-8 * e.norm()


@pytest.mark.parametrize("name", list(MODELS))
def test_the_two_sources_differ_in_what_is_said(name: str) -> None:
    build, _ = MODELS[name]
    torch.manual_seed(0)
    deepmind, transformers = build().eval(), build(like="transformers").eval()
    assert {m.activation for m in deepmind.modules() if hasattr(m, "activation")} == {"gelu_tanh"}
    assert {m.activation for m in transformers.modules() if hasattr(m, "activation")} == {"gelu"}
    assert deepmind.decoder.attention.residual == (name in ("fourier", "conv"))
    assert transformers.decoder.attention.residual == (name in ("fourier", "conv", "learned"))


def given(**changes: Any) -> PerceiverIO:
    sizes = {**TINY, "channels": 9, "query_channels": 7, "out_channels": 3, "qk_channels": 8, "layers_per_block": 1}
    return PerceiverIO.perceiver_pytorch(**{**sizes, **changes})


def test_queries_that_are_given() -> None:
    """For the whole batch or for each array; the graph is one; their gradient reaches them."""
    torch.manual_seed(0)
    model, x, queries = given().eval(), torch.randn(2, 11, 9), torch.randn(5, 7, requires_grad=True)
    out = model(x, points=queries)
    torch.testing.assert_close(out, model(InputArray.tokens(x), points=queries.expand(2, 5, 7)))
    expected = model.head.proj(model.decoder(queries[None], model.encoder(x)))
    torch.testing.assert_close(out, expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x, points=queries), out)
    out.sum().backward()
    assert queries.grad.abs().sum(1).all()
    raw = given(out_channels=None).eval()
    torch.testing.assert_close(raw(x, points=queries), raw.decoder(queries[None], raw.encoder(x)))


def test_encode_decode_by_hand() -> None:
    """A model is its parts, one after the other; masks reach the encoder and the decoder."""
    torch.manual_seed(0)
    model = PerceiverIO.language(**TINY_TEXT).eval()
    ids = torch.randint(0, 20, (2, 9))
    key_mask = torch.rand(2, 9) < 0.7
    array = model.preprocessor(ids)
    torch.testing.assert_close(array, model.preprocessor.embedding.weight[ids] + model.preprocessor.positions.weight[:9])
    latents = model.encoder(array, key_mask)
    decoded = model.decoder(model.queries.positions.weight[None, :9], latents, None, key_mask)
    expected = decoded @ model.preprocessor.embedding.weight.T + model.head.bias
    torch.testing.assert_close(model(ids, key_mask, query_mask=key_mask), expected)


@pytest.mark.parametrize("name", ["fourier", "flow"])
def test_masks_of_pixels(name: str) -> None:
    """What they hide is not read; outputs are asked for at all places all the same."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, raw = build().eval(), inputs()
    array = model.preprocessor(raw)
    key_mask = torch.rand(2, array.length) < 0.7
    queries = model.queries(array, None)
    latents = model.encoder(written_out(array, torch.float32), key_mask)
    expected = model.head(model.decoder(queries, latents), Source(array, model.preprocessor))
    torch.testing.assert_close(model(raw, key_mask), expected)
    lengths = torch.tensor([array.length, 5], dtype=torch.int32)
    torch.testing.assert_close(model(raw, lengths=lengths), model(raw, torch.arange(array.length) < lengths[:, None]))


def test_lengths_are_a_mask() -> None:
    torch.manual_seed(0)
    model, ids = PerceiverIO.language(**TINY_TEXT).eval(), torch.randint(0, 20, (2, 9))
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    torch.testing.assert_close(model(ids, lengths=lengths), model(ids, torch.arange(9) < lengths[:, None]))


class TestConv:
    @pytest.mark.parametrize(("size", "tokens"), [(224, 56), (30, 8), (29, 8), (7, 2)])
    def test_same_padding_covers_a_quarter(self, size: int, tokens: int) -> None:
        array = ConvPreprocessor(3, 4)(torch.randn(1, 3, size, size))
        assert array.grid == (tokens, tokens)

    def test_same_padding_as_written(self) -> None:
        """Every place is the product of the kernel with the window that starts two pixels before, zeros past the border."""
        torch.manual_seed(0)
        part, images = ConvPreprocessor(3, 4).eval(), torch.randn(1, 3, 16, 16)
        padded = torch.zeros(1, 3, 21, 21)
        padded[:, :, 2:18, 2:18] = images
        features = torch.stack([
            (padded[0, :, 2 * i : 2 * i + 7, 2 * j : 2 * j + 7] * part.conv.weight).sum((1, 2, 3))
            for i in range(8) for j in range(8)
        ]).T.unflatten(1, (8, 8))  # fmt: skip
        features = (features / (1 + 1e-5) ** 0.5).relu()
        pooled = [features[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((1, 2)) for i in range(4) for j in range(4)]
        torch.testing.assert_close(part(images).content[0], torch.stack(pooled), rtol=1e-4, atol=1e-5)

    def test_transformers_size(self) -> None:
        assert ConvPreprocessor(3, 4, padding="transformers")(torch.randn(1, 3, 224, 224)).grid == (55, 55)


def test_flow_patches_are_neighbourhoods() -> None:
    frames = torch.randn(2, 2, 3, 4, 5)
    unfolded = F.unfold(frames.flatten(0, 1), 3, padding=1).reshape(2, 2, 3, 9, 4, 5)  # colour, then (row, column)
    assert torch.equal(flow_patches(frames), unfolded.transpose(2, 3).reshape(2, 2, 27, 4, 5))


def test_points_are_read_by_their_coordinates() -> None:
    part = PointPreprocessor(2, FourierPositions(3, (10.0, 10.0, 10.0)))
    points = torch.randn(2, 5, 5)
    array = part(points)
    assert torch.equal(array.coordinates, points[..., :3]) and torch.equal(array.content, points[..., 3:])
    assert part.channels == array.channels == 2 + 21


class TestQueries:
    def test_all_places_are_a_dense_grid(self) -> None:
        queries = FourierQueries((3, 4), FourierPositions(2, (3.0, 4.0)))
        array = queries(torch.randn(2, 5, 1))
        assert array.grid == (3, 4) and array.length == 12 and array.batch == 1

    def test_picked_places_are_where_the_sources_put_them(self) -> None:
        queries = FourierQueries((3, 4), FourierPositions(2, (3.0, 4.0)))
        array = queries(torch.randn(2, 5, 1), torch.tensor([0, 7, 11]))
        expected = torch.tensor([[-1.0, -1.0], [-1 + 2 / 3, -1 + 6 / 4], [-1 + 4 / 3, -1 + 6 / 4]])
        torch.testing.assert_close(array.coordinates, expected)

    def test_learned(self) -> None:
        queries, array = LearnedQueries(6, 4), torch.randn(2, 5, 1)
        assert torch.equal(queries(array), queries.positions.weight[None])
        assert torch.equal(queries(array, torch.tensor([3, 1])), queries.positions.weight[None, [3, 1]])
        assert LearnedQueries(6, 4, like_inputs=True)(array).shape == (1, 5, 4)


class TestMultimodal:
    def test_every_modality_is_filled_up_in_the_order_of_names(self) -> None:
        part = CommonWidth({"b": 3, "a": 5}, 2)
        arrays = {"a": torch.randn(2, 4, 5), "b": torch.randn(2, 1, 3)}
        filled = part(arrays)
        assert list(filled) == ["a", "b"] and part.channels == 7
        assert torch.equal(filled["b"], torch.cat((arrays["b"], part.padding["b"].expand(2, 1, 4)), 2))

    def test_tokens_are_hidden_with_their_probability(self) -> None:
        torch.manual_seed(0)
        parts = {"x": LabelPreprocessor(3), "y": LabelPreprocessor(3)}
        part = MultimodalPreprocessor(parts, 1, {"x": 0.25, "y": 1.0})
        array = part({"x": torch.randn(4000, 3), "y": torch.randn(4000, 3)})
        hidden = (array[:, 0] == part.mask_tokens["x"]).all(1).float().mean()
        assert abs(hidden - 0.25) < 0.03 and (array[:, 1] == part.mask_tokens["y"]).all()

    def test_written_out(self) -> None:
        array = InputArray.image(torch.randn(2, 3, 4, 5), FourierPositions(2, (4.0, 5.0)))
        tokens = written_out(array, torch.float32)
        assert tokens.shape == (2, 20, 13) and torch.equal(tokens[..., :3], array.content)

    def test_an_array_that_is_taken_apart_is_put_together(self) -> None:
        build, inputs = MODELS["multimodal"]
        torch.manual_seed(0)
        model, raw = build().eval(), inputs()
        out = model(raw)
        assert {name: tuple(t.shape) for name, t in out.items()} == {"audio": (2, 16), "image": (2, 128, 3), "label": (2, 5)}
        points = {"audio": torch.arange(4)[1:3], "image": torch.tensor([127]), "label": None}
        some = model(raw, points=points)
        assert {name: tuple(t.shape) for name, t in some.items()} == {"audio": (2, 8), "image": (2, 1, 3), "label": (2, 5)}


def encoder(channels: int) -> PerceiverEncoder:
    return PerceiverEncoder(EncoderConfig(input_dim=channels, num_latents=2, latent_dim=8, num_blocks=1, num_cross_attends=1))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PixelPreprocessor()(torch.randn(2, 1, 4, 4)), ValueError, r"images must be \[B, Ch, H, W\] with Ch=3, got"),
        (
            lambda: MODELS["learned"][0]()(torch.randn(2, 3, 6, 7)), ValueError,
            r"images must be \(6, 6\) as the learned positions, got \(6, 7\)",
        ),
        (lambda: TextPreprocessor(20)(torch.tensor([[3, 20]])), ValueError, r"ids must be in 0..vocab_size-1=19, got 3..20"),
        (lambda: TextPreprocessor(20)(torch.tensor([[-1, 2]])), ValueError, r"ids must be in 0..vocab_size-1=19, got -1..2"),
        (
            lambda: TextPreprocessor(20, 8, 4)(torch.zeros(1, 5, dtype=torch.int64)), ValueError,
            "ids must hold at most max_length=4 tokens, got 5",
        ),
        (lambda: TextPreprocessor(20)(torch.zeros(1, 2)), TypeError, "ids must be int64 or int32, got float32"),
        (
            lambda: MODELS["flow"][0]()(torch.randn(2, 2, 3, 4, 5)), ValueError,
            r"frames must be \[B, 2, Ch, H, W\] with Ch=27, got \(2, 2, 3, 4, 5\)",
        ),
        (
            lambda: MODELS["multimodal"][0]()({"image": torch.zeros(1)}), ValueError,
            "inputs must hold 'audio', 'image', 'label', got 'image'",
        ),
        (lambda: MODELS["multimodal"][0]()(torch.zeros(1)), TypeError, "inputs must map 'audio', 'image', 'label' to tensors"),
        (
            lambda: MODELS["flow"][0]()(MODELS["flow"][1](), points=torch.tensor([1])), TypeError,
            "points must be a slice or None where the inputs are the queries",
        ),
        (
            lambda: given()(torch.zeros(2, 4, 9)), TypeError,
            r"points must be a tensor \[B, O, C\] or .* C=7, the queries, got NoneType",
        ),
        (
            lambda: given()(torch.zeros(2, 4, 9), points=torch.zeros(3, 6)), ValueError,
            r"points must be .* C=7, the queries, got \(3, 6\)",
        ),
        (lambda: given()([1.0]), TypeError, "inputs must be a Tensor or InputArray, got list"),
        (lambda: given()(torch.zeros(2, 4, 8), points=torch.zeros(3, 7)), ValueError, "inputs must have input_dim=9 channels"),
        (lambda: PerceiverIO.imagenet_fourier(like="keras"), ValueError, "like must be one of 'deepmind', 'transformers'"),
        (
            lambda: MultimodalPreprocessor({"x": LabelPreprocessor(3)}, 1, {"z": 0.5}), ValueError,
            "mask_probs must name modalities among x, got 'z'",
        ),
        (
            lambda: PerceiverIO(PixelPreprocessor(), encoder(9), LearnedQueries(1, 8), OutputBlock(8, 8), ClassHead(8, 2)),
            ValueError, "encoder must read 261 channels, got input_dim=9",
        ),
        (
            lambda: PerceiverIO(LabelPreprocessor(9), encoder(9), InputQueries(9), OutputBlock(8, 8), ClassHead(8, 2)),
            ValueError, "decoder must take queries of 9, got query_dim=8",
        ),
        (lambda: FourierQueries((3,), FourierPositions(2, (3.0, 4.0))), ValueError, r"grid must have the 2 axes .*\(3,\)"),
    ],
)  # fmt: skip
def test_wrong_use_is_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("forward", [False, True], ids=["backward in the block", "forward in the block"])
def test_checkpointing_computes_again_on_the_same_backends(forward: bool) -> None:
    build, inputs = MODELS["fourier"]
    model, kept, images = build(), build(activation_checkpointing=True), inputs()
    kept.load_state_dict(model.state_dict())
    for each in (model, kept):
        with use_backend("reference") if forward else contextlib.nullcontext():
            loss = each(images).square().sum()
        with contextlib.nullcontext() if forward else use_backend("reference"):
            loss.backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), kept.parameters(), strict=True))
