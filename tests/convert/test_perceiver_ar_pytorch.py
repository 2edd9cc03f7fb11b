"""perceiver-ar-pytorch: its weights in ours and back, and the same logits and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import convert
from perceiver_kernels.convert.perceiver_ar_pytorch import perceiver_ar
from perceiver_kernels.models import Perceiver, PerceiverAR
from perceiver_kernels.models import perceiver_ar as module
from perceiver_kernels.testing.accuracy import assert_as_accurate

Original = pytest.importorskip("perceiver_ar_pytorch").PerceiverAR
AutoregressiveWrapper = pytest.importorskip("perceiver_ar_pytorch.autoregressive_wrapper").AutoregressiveWrapper

B, M, P, VOCAB = 2, 24, 16, 13

# The README's model, scaled down; several layers that read the prefix; heads of other widths.
SIZES: dict[str, dict[str, int]] = {
    "readme": {"dim": 128, "depth": 3, "heads": 2, "dim_head": 64, "perceive_depth": 1},
    "deep": {"dim": 40, "depth": 2, "heads": 3, "dim_head": 32, "perceive_depth": 3},
    "wide heads": {"dim": 48, "depth": 1, "heads": 2, "dim_head": 80, "perceive_depth": 2},
    "no blocks": {"dim": 32, "depth": 0, "heads": 4, "dim_head": 40, "perceive_depth": 1},
}


def original(sizes: dict[str, int], **changes: Any) -> Original:
    """Theirs with every parameter random."""
    torch.manual_seed(0)
    model = Original(num_tokens=VOCAB, max_seq_len=M, cross_attn_seq_len=P, **sizes, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(theirs: nn.Module, sizes: dict[str, int], **changes: Any) -> PerceiverAR:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "max_length": M, "num_latents": M - P, "dim": sizes["dim"], "num_heads": sizes["heads"],
        "head_dim": sizes["dim_head"], "num_layers": sizes["depth"], "num_perceiver_layers": sizes["perceive_depth"],
        "rotary_width": max(32, sizes["dim_head"] // 2), "prefix_dropout": 0.0,
    }  # fmt: skip
    model = PerceiverAR.perceiver_ar_pytorch(**{**settings, **changes}).eval()
    convert.load(model, theirs.state_dict(), "perceiver_ar_pytorch")
    return model


def tokens(length: int = M) -> Tensor:
    return torch.randint(0, VOCAB, (B, length), generator=torch.Generator().manual_seed(1))


def in_double(theirs: nn.Module, model: PerceiverAR, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, PerceiverAR]:
    """Both in fp64. Our tables, which are rounded to fp32, are replaced by the original's angles, so that the rest can be
    compared to the last digits; ``test_angles`` compares the tables."""
    frequencies = theirs.rotary_pos_emb.inv_freq.double()

    def tables(places: Tensor, width: int, *, base: float) -> tuple[Tensor, Tensor]:
        assert width == 2 * len(frequencies) and base == 10_000
        angles = places.double()[:, None] * frequencies
        return angles.cos(), angles.sin()

    monkeypatch.setattr(module, "rotary_tables", tables)
    return theirs.double(), model.double()


def named_gradients(loss: Tensor, model: nn.Module, ours: PerceiverAR | None = None) -> dict[str, Tensor]:
    """Gradients under the names of ``ours``; None: under the model's."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    state = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    return state if ours is None else convert.to_ours(perceiver_ar(ours), state, ours.state_dict())


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("mode", ["whole", "short", "masked", "prefix dropout", "hidden dropout"])
def test_same_logits_and_gradients(case: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64. Dropout of the prefix and of hidden channels draws as theirs does: the same seed keeps the same."""
    drops: dict[str, Any] = {"prefix dropout": {"cross_attn_dropout": 0.3}, "hidden dropout": {"dropout": 0.2}}.get(mode, {})
    theirs = original(SIZES[case], **drops)
    model = ours(
        theirs, SIZES[case], prefix_dropout=drops.get("cross_attn_dropout", 0.0), hidden_dropout=drops.get("dropout", 0.0)
    )
    for layer in theirs.perceive_layers:
        layer[0].dropout.p = 0.0  # of attention weights, which the kernels draw in another way
    theirs, model = in_double(theirs, model, monkeypatch)
    x = tokens(M - 3 if mode == "short" else M)
    mask = torch.rand(B, P, generator=torch.Generator().manual_seed(2)) < 0.6 if mode == "masked" else None
    theirs.train(bool(drops))
    model.train(bool(drops))
    torch.manual_seed(3)
    expected = theirs(x, prefix_mask=mask)
    torch.manual_seed(3)
    actual = model(x, P, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = named_gradients((actual * upstream).sum(), model)
    others = named_gradients((expected * upstream).sum(), theirs, model)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert gradient.abs().max() > 0, name
    if drops:
        theirs.eval()
        assert not torch.allclose(theirs(x, prefix_mask=mask), expected), "something was dropped"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SIZES)
def test_as_accurate_as_the_original(case: str, dtype: torch.dtype) -> None:
    """Rotary tables included; the oracle is the original in fp64 with frequencies that were never rounded."""
    theirs = original(SIZES[case])
    frequencies, width = theirs.rotary_pos_emb.inv_freq, max(32, SIZES[case]["dim_head"] // 2)
    model, eager = ours(theirs, SIZES[case]).to(dtype), theirs.to(dtype)
    oracle = copy.deepcopy(eager).double()
    oracle.rotary_pos_emb.inv_freq = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    # Frequencies of 16 bits would be a loss of the conversion, not of the computation: theirs stay in fp32, the angles do not.
    eager.rotary_pos_emb.inv_freq = frequencies
    angles = eager.rotary_pos_emb.forward
    eager.rotary_pos_emb.forward = lambda *arguments, **keywords: angles(*arguments, **keywords).to(dtype)
    with torch.no_grad():
        assert_as_accurate(model(tokens()), eager(tokens()), oracle(tokens()), "logits")


@pytest.mark.parametrize("case", ["readme", "deep"])
def test_generates_what_the_original_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, past the longest sequence: its latents grow behind a prefix of fixed length, then its window slides by one."""
    theirs = original(SIZES[case])
    theirs, model = in_double(theirs, ours(theirs, SIZES[case]), monkeypatch)
    prompt = tokens(P + 2)
    expected = AutoregressiveWrapper(theirs).generate(prompt, 20, filter_thres=1 - 1.01 / VOCAB)
    actual = model.generate(prompt, 20, temperature=0.0, prefix_length=P, stride=1)
    assert torch.equal(actual, torch.cat((prompt, expected), 1))
    assert len(actual.unique()) > 3


def test_angles() -> None:
    """Tables against the original's: their fp32 angles are off by up to half a unit in the last place of the position."""
    theirs = original(SIZES["readme"])
    model = PerceiverAR.perceiver_ar_pytorch(device="meta", max_length=512, num_latents=128)
    rotary = model._rotary(0, 512, torch.device("cpu"))
    assert rotary is not None and not rotary.interleaved
    angles = theirs.rotary_pos_emb(512, device="cpu")
    bound = 512 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.cat((rotary.cos, rotary.cos), -1), angles.cos(), rtol=0, atol=bound)
    torch.testing.assert_close(torch.cat((rotary.sin, rotary.sin), -1), angles.sin(), rtol=0, atol=bound)


@pytest.mark.parametrize("case", SIZES)
def test_there_and_back(case: str) -> None:
    theirs = original(SIZES[case])
    model = ours(theirs, SIZES[case])
    back = convert.to_library(model, "perceiver_ar_pytorch")
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    other = original(SIZES[case])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(back)
    assert torch.equal(other(tokens()), theirs(tokens()))
    again = ours(other, SIZES[case])
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_readme_sizes_have_the_originals_parameters() -> None:
    with torch.device("meta"):
        theirs = Original(
            num_tokens=20_000, dim=512, depth=8, dim_head=64, heads=8, max_seq_len=4096, cross_attn_seq_len=3072,
            cross_attn_dropout=0.5,
        )  # fmt: skip
    model = PerceiverAR.perceiver_ar_pytorch(device="meta")
    assert model.num_params() == sum(parameter.numel() for parameter in theirs.parameters())
    assert model.config.prefix_dropout == 0.5 and model.config.max_prefix == 3072
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in convert.to_library(model, "perceiver_ar_pytorch").items()} == shapes


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        convert.to_library(PerceiverAR.clm_small(device="meta"), "perceiver_ar_pytorch")
    message = str(error.value)
    assert message.startswith("model must be built as perceiver_ar_pytorch's, got ")
    for part in ("rotary_interleaved=True instead of False", "tied_logits=True instead", "num_rotary_layers=1 instead of None"):
        assert part in message
    with pytest.raises(ValueError, match="perceiver_ar_pytorch has no model like Perceiver, but PerceiverAR"):
        convert.to_library(Perceiver.imagenet(device="meta"), "perceiver_ar_pytorch")


def test_wrong_weights_are_listed() -> None:
    theirs = original(SIZES["readme"])
    state = theirs.state_dict()
    del state["pos_emb.weight"], state["rotary_pos_emb.inv_freq"]
    with pytest.raises(ValueError, match="it lacks: pos_emb.weight$"):
        convert.load(ours(theirs, SIZES["readme"]), state, "perceiver_ar_pytorch")
