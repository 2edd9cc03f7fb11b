"""replace_attention on krasserm's perceiver-io: its models, every option of its attention, its cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import functional, replace_attention
from tests.convert.krasserm import needs_perceiver_io
from tests.convert.krasserm import theirs as library
from tests.integrations.replaced import (
    DEVICES,
    Case,
    LoRALinear,
    assert_accurate,
    assert_accurate_in_bfloat16,
    assert_agree,
    assert_compiles,
    assert_drops,
    assert_later_parts_run,
    assert_replaced,
    kept_reasons,
    results,
)

pytestmark = needs_perceiver_io

B, N, M = 2, 5, 9
LATENTS: dict[str, int] = {"num_latents": 6, "num_latent_channels": 16}
BLOCKS: dict[str, Any] = {
    "num_cross_attention_heads": 1, "num_self_attention_heads": 2, "num_self_attention_layers_per_block": 2,
    "num_self_attention_blocks": 3,
}  # fmt: skip


def padding(length: int, start: bool = False) -> Tensor:
    """True where tokens are padding: three at the end or the start of an entry, and all of the last."""
    pad = torch.zeros(B, length, dtype=torch.bool)
    pad[0, :3] = True
    pad[1] = True
    return pad if start else pad.flip(1)


def image_classifier(side: int = 5, sizes: Any = LATENTS, classes: int = 5, **changes: Any) -> nn.Module:
    image = library.image
    encoder = image.ImageEncoderConfig(
        image_shape=(side, side - 1, 1), num_frequency_bands=3, **{**BLOCKS, "num_cross_attention_layers": 3, **changes}
    )
    decoder = image.ClassificationDecoderConfig(num_classes=classes, num_output_query_channels=14, num_cross_attention_heads=1)
    return image.ImageClassifier(image.ImageClassifierConfig(encoder, decoder, **sizes))


def language_model(length: int = 12, sizes: Any = LATENTS, **changes: Any) -> nn.Module:
    language = library.language
    encoder = language.TextEncoderConfig(
        vocab_size=13, max_seq_len=length, num_input_channels=10, num_cross_attention_qk_channels=6,
        num_cross_attention_v_channels=12, **{**BLOCKS, **changes},
    )  # fmt: skip
    decoder = language.TextDecoderConfig(
        vocab_size=13, max_seq_len=length, num_cross_attention_heads=1, cross_attention_residual=False
    )
    return language.MaskedLanguageModel(language.MaskedLanguageModelConfig(encoder, decoder, **sizes))


def causal_model(length: int = 20, latents: int = 8, **changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": 13, "max_seq_len": length, "max_latents": latents, "cross_attention_dropout": 0.0, "num_channels": 48,
        "num_heads": 3, "num_self_attention_layers": 3, "num_self_attention_rotary_layers": 2,
    }  # fmt: skip
    model = library.core.CausalSequenceModel(library.config.CausalSequenceModelConfig(**{**sizes, **changes}))
    part = model.input_adapter.frq_pos_encoding
    forward = type(part).forward
    # Its einsum of integer places and frequencies needs one dtype.
    part.forward = lambda places: forward(part, places.to(part.inv_freq))
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(0, 13, (B, length), generator=torch.Generator().manual_seed(5))


def cross_attention(**changes: Any) -> nn.Module:
    sizes = {"num_heads": 1, "num_q_input_channels": 8, "num_kv_input_channels": 9, "num_qk_channels": 6, "num_v_channels": 4}
    return library.core.CrossAttention(**{**sizes, **changes})


def self_attention(**changes: Any) -> nn.Module:
    return library.core.SelfAttention(**{"num_heads": 2, "num_channels": 16, "num_v_channels": 6, **changes})


def turns(length: int, width: int = 4, batch: int = B) -> Tensor:
    """What rotary positions are made of."""
    places = torch.rand(batch, length, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 30
    return library.position.FrequencyPositionEncoding(width).double()(places)


def rotary(turns: Tensor, right_align: bool = False) -> Any:
    return library.position.RotaryPositionEmbedding(turns, right_align=right_align)


def on_data(model: nn.Module, data: Tensor, **options: Any) -> Any:
    out = model(data, **options)
    return out if isinstance(out, Tensor) else out.logits


def attend(model: nn.Module, x: Tensor, *, turns: Tensor | None = None, **options: Tensor) -> Tensor:
    return model(x, rot_pos_emb=None if turns is None else rotary(turns), **options).last_hidden_state


def read(model: nn.Module, x_q: Tensor, x_kv: Tensor, **options: Tensor) -> Tensor:
    return model(x_q, x_kv, **options).last_hidden_state


def read_prefix(model: nn.Module, x_q: Tensor, prefix: Tensor, pad: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Perceiver AR's: a prefix and the queries, in order."""
    of_queries, of_keys = (rotary(each, right_align=True) for each in turns)
    return model(
        x_q, x_kv_prefix=prefix, pad_mask=pad, rot_pos_emb_q=of_queries, rot_pos_emb_k=of_keys
    ).last_hidden_state


def converted(attentions: int, crosses: int, encoders: int = 0) -> dict[str, int]:
    found = {"MultiHeadAttention": attentions, "CrossAttention": crosses, "PerceiverEncoder": encoders}
    return {name: count for name, count in found.items() if count}


def cases(
    N: int, M: int, *, qk: int = 6, v: int = 4, channels: int = 16, side: int = 5, length: int = 12, tail: int = 8,
    classes: int = 5, sizes: Any = LATENTS,
) -> dict[str, Case]:  # fmt: skip
    """Models, and attention with every option.

    Args:
        N, M: queries and inputs of attention. qk, v, channels: its widths, of two heads together where it has two.
        side, classes: of images. length: of texts, and of a prefix that ``tail`` tokens follow.
        sizes: of the models' latents.
    """
    arrays = {"x_q": (B, N, 8), "x_kv": (B, M, 9)}

    def of_language(**masks: Tensor) -> Case:
        # The text encoder has one layer that reads: it is the class itself that is left alone.
        return Case(
            functools.partial(language_model, length, sizes), on_data, {}, converted(4, 2), {"TextEncoder": 1},
            lambda: {"data": tokens(length), **masks},
        )  # fmt: skip

    def of_causal(mask: Any = dict, **options: int) -> Case:
        build = functools.partial(causal_model, length + tail, tail, **options)
        inputs = {"data": tokens(length + tail), "prefix_len": length}
        return Case(build, on_data, {}, converted(4, 1), arrays=lambda: inputs | mask())

    def half_padded() -> dict[str, Tensor]:
        """Of one entry even latents are padding."""
        pad = torch.zeros(B, length + tail, dtype=torch.bool)
        pad[0, : length + 2] = True
        return {"pad_mask": pad}

    def of_cross(shapes: Any = None, call: Any = read, make: Any = dict, **options: Any) -> Case:
        build = functools.partial(cross_attention, **{"num_qk_channels": qk, "num_v_channels": v, **options})
        return Case(build, call, arrays | (shapes or {}), converted(1, 1), arrays=make)

    def of_prefix() -> dict[str, Any]:
        return {"pad": padding(M + N, start=True), "turns": (turns(N), turns(M + N))}

    def of_self(make: Any = dict) -> Case:
        build = functools.partial(self_attention, num_channels=channels, num_v_channels=channels - 10)
        return Case(build, attend, {"x": (B, N, channels)}, converted(1, 0), arrays=make)

    return {
        "image": Case(
            functools.partial(image_classifier, side, sizes, classes), on_data, {"data": (B, side, side - 1, 1)},
            converted(5, 3, 1),
        ),
        "language": of_language(),
        "language, padded": of_language(pad_mask=padding(length)),
        "causal": of_causal(),
        "causal, padded": of_causal(half_padded, max_heads_parallel=2),
        "cross": of_cross(),
        "cross, one set": of_cross({"x_q": (1, N, 8)}),
        "cross, one input": of_cross({"x_kv": (1, M, 9)}),
        "cross, many queries": of_cross({"x_q": (1, M + 3, 8)}),
        "cross, padded": of_cross(
            make=lambda: {"pad_mask": padding(M)}, num_heads=2, qkv_bias=False, out_bias=False
        ),
        "cross, wide": of_cross({"x_kv": (B, M, 1100)}, num_kv_input_channels=1100),
        "cross, causal": of_cross(causal_attention=True),
        "cross, causal, fewer keys": of_cross({"x_kv": (B, 3, 9)}, causal_attention=True),
        "prefix": Case(
            functools.partial(cross_attention, num_kv_input_channels=8, causal_attention=True, num_qk_channels=qk), read_prefix,
            {"x_q": (B, N, 8), "prefix": (B, M, 8)}, converted(1, 1), arrays=of_prefix,
        ),
        "self": of_self(),
        "self, rotated": of_self(lambda: {"pad_mask": padding(N, start=True), "turns": turns(N + 2)}),
    }  # fmt: skip


CASES = cases(N, M)
LARGE = cases(
    64, 300, qk=48, v=32, channels=64, side=16, length=256, tail=64, classes=32,
    sizes={"num_latents": 64, "num_latent_channels": 64},
)  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_replaced(name: str, training: bool) -> None:
    assert_replaced(CASES[name], training=training)


@pytest.mark.parametrize("name", ["cross", "prefix"])
def test_compiled(name: str) -> None:
    assert_compiles(CASES[name])


@pytest.mark.parametrize("name", ["image", "cross", "causal"])
def test_fp32(name: str) -> None:
    assert_accurate(CASES[name])


def test_autocast() -> None:
    assert_accurate(CASES["image"], autocast=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["image", "cross, one set", "cross, many queries", "cross, padded", "self, rotated"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(CASES[name])


@pytest.mark.parametrize("name", ["image", "causal"])
def test_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"dropout": 0.25} if name == "image" else {"post_attention_dropout": 0.25}
    assert_drops(CASES[name], monkeypatch, 0.25, **changes)


def test_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of an encoder, two of them one, read one packed form."""
    packs = []
    original = functional.pack_inputs

    def recording(content: Tensor, *args: Any, **options: Any) -> Any:
        packs.append(tuple(content.shape))
        return original(content, *args, **options)

    case = CASES["image"]
    model = case.model()
    replace_attention(model)
    monkeypatch.setattr(functional, "pack_inputs", recording)
    model(case.data()["data"])
    # The image, once, and what the decoder's single query reads.
    assert packs == [(B, 20, 15), (B, 6, 16)]


@pytest.mark.parametrize("rows", [1, 2])
def test_rotary_positions_of_other_lengths(rows: int) -> None:
    """Too few rows of positions are the original's to broadcast, or to refuse."""
    original = self_attention().attention.double()
    x = torch.randn(B, N, 16).double()
    positions = rotary(turns(rows))
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(original(x, x, rot_pos_emb_k=positions).last_hidden_state)
        except RuntimeError as error:
            outcomes.append(str(error))
        replace_attention(original)
    assert isinstance(outcomes[0], Tensor) == (rows == 1)
    if rows == 1:
        torch.testing.assert_close(outcomes[1], outcomes[0])
    else:
        assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("rotated", [False, True])
def test_cache(rotated: bool) -> None:
    """A sequence in three parts, with what came before: outputs and caches are the original's."""
    model = self_attention(causal_attention=True).double().eval()
    x = torch.randn(B, N, 16).double()

    def run() -> tuple[Tensor, Any]:
        empty = library.core.SelfAttentionLayer(2, 16, num_v_channels=6).empty_kv_cache(x)
        outputs, cache = [], empty
        for start, stop in ((0, 2), (2, 3), (3, N)):
            positions = rotary(turns(N)) if rotated else None
            found = model.attention(
                model.norm(x[:, start:stop]), model.norm(x[:, start:stop]), rot_pos_emb_k=positions, kv_cache=cache
            )
            outputs.append(found.last_hidden_state)
            cache = found.kv_cache
        return torch.cat(outputs, 1), cache

    expected, kept = run()
    assert replace_attention(model).converted
    out, cache = run()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(cache[0], kept[0]) and torch.equal(cache[1], kept[1])


def test_generation() -> None:
    """Perceiver AR, token by token through its cache."""
    model = causal_model().double().eval()

    def run() -> Tensor:
        ids, cache, logits = tokens(10), [], []
        with torch.no_grad():
            out = model(ids, prefix_len=6, kv_cache=cache)
            for _ in range(3):
                logits.append(out.logits[:, -1])
                ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), 1)
                out = model(ids[:, -1:], prefix_len=6, kv_cache=out.kv_cache)
        return torch.stack(logits)

    expected = run()
    replace_attention(model)
    torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-10)


def test_left_alone() -> None:
    class Subclass(library.core.CrossAttention):
        pass

    lora, hooked, subclass = cross_attention(), cross_attention(), Subclass(1, 8, 9)
    lora.attention.k_proj = LoRALinear(lora.attention.k_proj)
    hooked.attention.q_proj.register_forward_pre_hook(lambda *args: None)
    model = nn.ModuleDict({"lora": lora, "hooked": hooked, "subclass": subclass})
    case = Case(lambda: model, lambda m, x_q, x_kv: sum(read(m[name], x_q, x_kv) for name in m), CASES["cross"].shapes, {})
    case.model()
    expected = results(case, model)
    kept = kept_reasons(model)
    assert set(kept) == {"lora", "lora.attention", "hooked", "hooked.attention", "subclass"}
    assert all("LoRALinear" in kept[name] for name in ("lora", "lora.attention"))
    assert kept["hooked"].startswith("attention.q_proj has hooks") and kept["hooked.attention"].startswith("q_proj has hooks")
    assert "subclass of CrossAttention" in kept["subclass"]
    assert type(lora) is type(hooked) is library.core.CrossAttention
    assert_agree(results(case, model), expected)
