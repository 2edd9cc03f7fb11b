"""replace_attention on perceiver-ar-pytorch: its models, masks and positions, and the part of the prefix that it leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from tests.integrations.replaced import (
    Case,
    LoRALinear,
    assert_accurate,
    assert_agree,
    assert_compiles,
    assert_copies,
    assert_drops,
    assert_reversible,
    assert_same_results,
    dropout_seen,
    kept_reasons,
    results,
)

library = pytest.importorskip(
    "perceiver_ar_pytorch.perceiver_ar_pytorch", reason="perceiver-ar-pytorch is not installed"
)
wrapper = pytest.importorskip(
    "perceiver_ar_pytorch.autoregressive_wrapper", reason="perceiver-ar-pytorch is not installed"
)

B, N, M, DIM, HEADS, WIDTH = 2, 8, 16, 24, 2, 32
PREFIX = {"x": (B, N, DIM), "context": (B, M, DIM)}


def perceiver_ar(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "num_tokens": 13, "max_seq_len": M + N, "cross_attn_seq_len": M, "dim": DIM, "depth": 2, "heads": HEADS,
        "dim_head": WIDTH, "perceive_depth": 2,
    }  # fmt: skip
    return library.PerceiverAR(**{**sizes, **changes})


def tokens(length: int = M + N) -> Tensor:
    return torch.randint(0, 13, (B, length), generator=torch.Generator().manual_seed(5))


def seen(length: int = M) -> Tensor:
    """A third is hidden; of the last entry, all."""
    mask = torch.rand(B, length, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[-1] = False
    return mask


def angles(length: int, width: int = WIDTH) -> Tensor:
    return library.RotaryEmbedding(width).double()(length, device="cpu")


def prefix_attention(**changes: Any) -> nn.Module:
    return library.CausalPrefixAttention(**{"dim": DIM, "dim_head": WIDTH, "heads": HEADS, **changes})


def attention(**changes: Any) -> nn.Module:
    return library.CausalAttention(**{"dim": DIM, "dim_head": WIDTH, "heads": HEADS, **changes})


def loss(model: nn.Module) -> Tensor:
    return model(tokens(), prefix_mask=seen(), labels=tokens())


MODEL = {"CausalPrefixAttention": 2, "CausalAttention": 2}
ONE_PREFIX, ONE = {"CausalPrefixAttention": 1}, {"CausalAttention": 1}
CASES = {
    "model": Case(perceiver_ar, lambda m: m(tokens()), {}, MODEL),
    "short": Case(perceiver_ar, lambda m: m(tokens(M + 1)), {}, MODEL),
    "loss": Case(lambda **c: perceiver_ar(dim_head=40, heads=3, **c), loss, {}, MODEL),
    "prefix": Case(prefix_attention, lambda m, x, context: m(x, context), PREFIX, ONE_PREFIX),
    "rotated": Case(
        lambda **c: prefix_attention(heads=3, **c),
        lambda m, x, context: m(x, context, context_mask=seen(), rotary_pos_emb=angles(M + N)), PREFIX, ONE_PREFIX,
    ),
    "short mask": Case(
        prefix_attention, lambda m, x, context: m(x, context, seen(M - 3), angles(M + N, 16)), PREFIX, ONE_PREFIX
    ),
    "mask of all": Case(prefix_attention, lambda m, x, context: m(x, context, seen(M + N)), PREFIX, ONE_PREFIX),
    "angles for each entry": Case(
        prefix_attention, lambda m, x, context: m(x, context, None, angles(M + N).expand(B, 1, -1, -1)), PREFIX, ONE_PREFIX
    ),
    "more angles": Case(prefix_attention, lambda m, x, context: m(x, context, None, angles(M + N + 3)), PREFIX, ONE_PREFIX),
    "no prefix": Case(
        prefix_attention, lambda m, x, context: m(x, context, None, angles(N)), {**PREFIX, "context": (B, 0, DIM)}, ONE_PREFIX
    ),
    "self": Case(attention, lambda m, x: m(x), {"x": (B, N, DIM)}, ONE),
    "self, rotated": Case(attention, lambda m, x: m(x, angles(M + N)), {"x": (B, N, DIM)}, ONE),
    "self, angles for each entry": Case(
        attention, lambda m, x: m(x, angles(N).expand(B, 1, -1, -1)), {"x": (B, N, DIM)}, ONE
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_results(name: str, training: bool) -> None:
    assert not assert_same_results(CASES[name], training=training).kept


@pytest.mark.parametrize("name", ["model", "rotated", "self, rotated"])
def test_way_back(name: str) -> None:
    assert_reversible(CASES[name])


def test_copies() -> None:
    assert_copies(CASES["loss"])


@pytest.mark.parametrize("name", ["rotated", "self, rotated"])
def test_compiled(name: str) -> None:
    assert_compiles(CASES[name])


@pytest.mark.parametrize("name", ["model", "loss"])
def test_fp32(name: str) -> None:
    assert_accurate(CASES[name])


def test_autocast() -> None:
    """The original cannot fill 16-bit scores with fp32's lowest number; its replacement fills nothing."""
    case = CASES["model"]
    model = case.model(torch.float32)
    expected = case.call(model)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="overflow"):
            case.call(model)
        replace_attention(model)
        out = case.call(model)
    assert (out - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", ["prefix", "self"])
def test_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_drops(CASES[name], monkeypatch, 0.25, dropout=0.25)


@pytest.mark.parametrize("name", ["prefix", "self"])
def test_everything_dropped(name: str) -> None:
    """A probability of 1, which these kernels do not take, is left to the original."""
    assert_same_results(CASES[name], training=True, dropout=1.0)


@pytest.mark.parametrize("name", ["model", "prefix", "rotated"])
def test_parts_of_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed the original and its replacement leave out the same tokens, and neither does in evaluation."""
    case = CASES[name]
    model = case.model(cross_attn_dropout=0.4).train()
    if name == "prefix":
        # The original's prefix dropout takes positions for granted: angles of 0 turn nothing.
        still = torch.zeros(M + N, WIDTH).double()
        case = Case(case.build, lambda m, x, context: m(x, context, None, still), case.shapes, case.converted)

    def run() -> dict[str, Tensor]:
        torch.manual_seed(7)
        return results(case, model)

    expected = run()
    replace_attention(model)
    lengths = dropout_seen(monkeypatch)
    assert_agree(run(), expected)
    assert lengths, "the original's attention ran"
    torch.manual_seed(8)
    assert not torch.allclose(results(case, model)["out"], expected["out"])
    model.eval()
    assert torch.equal(results(case, model)["out"], results(case, model)["out"])


def test_mask_that_does_not_fit_the_prefix() -> None:
    """Where parts of the prefix are left out, the original's error."""
    model = prefix_attention(cross_attn_dropout=0.4).double().train()
    replace_attention(model)
    arrays = (torch.randn(B, N, DIM).double(), torch.randn(B, M, DIM).double())
    with pytest.raises(IndexError, match="does not match"):
        model(*arrays, context_mask=seen(M - 3), rotary_pos_emb=angles(M + N))


def test_generation() -> None:
    """The library's wrapper draws the same tokens from the same seed."""
    model = wrapper.AutoregressiveWrapper(perceiver_ar().double())

    def run() -> Tensor:
        torch.manual_seed(3)
        return model.generate(tokens(M + 1), 4)

    expected = run()
    assert len(replace_attention(model).converted) == 4
    assert torch.equal(run(), expected)


def test_left_alone() -> None:
    class Subclass(library.CausalAttention):
        pass

    sizes = {"dim": DIM, "dim_head": WIDTH, "heads": HEADS}
    parts = {
        "lora": attention(), "hooked": attention(), "patched": attention(), "subclass": Subclass(**sizes),
        "prefix": prefix_attention(),
    }  # fmt: skip
    parts["lora"].to_qkv = LoRALinear(parts["lora"].to_qkv)
    parts["hooked"].norm.register_full_backward_hook(lambda *args: None)
    parts["patched"].to_out.forward = parts["patched"].to_out.forward
    parts["prefix"].to_kv = LoRALinear(parts["prefix"].to_kv)
    model = nn.ModuleDict(parts)

    def call(model: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return sum(m(x) for name, m in model.items() if name != "prefix") + model["prefix"](x, context)

    case = Case(lambda: model, call, PREFIX, {})
    case.model()
    expected = results(case, model)
    kept = kept_reasons(model)
    assert set(kept) == set(parts) and not replace_attention(model).converted
    assert "to_qkv is a LoRALinear" in kept["lora"] and "to_kv is a LoRALinear" in kept["prefix"]
    assert "norm has hooks" in kept["hooked"] and "to_out has a forward of its own" in kept["patched"]
    assert "subclass of CausalAttention" in kept["subclass"]
    assert_agree(results(case, model), expected)
