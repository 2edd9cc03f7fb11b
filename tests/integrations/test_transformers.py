"""transformers' attention interface: registration, masks, Q-Former and Idefics2 through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from tests.integrations.agreement import assert_replaced, assert_same, randomised, results

transformers = pytest.importorskip("transformers", minversion="5.0")

from perceiver_kernels.integrations import transformers as integration  # noqa: E402

QFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "encoder_hidden_size": 24,
    "cross_attention_frequency": 1, "vocab_size": 30, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def media(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
def test_blip_2_q_former(masked: bool) -> None:
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = transformers.Blip2QFormerConfig(**QFORMER)
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to fp32
    model, queries, images = randomised(Blip2QFormerModel(config)), media(2, 5, 32), media(2, 11, 24, seed=3)
    mask = {"encoder_attention_mask": visible(2, 11)} if masked else {}
    report = assert_replaced(
        model, lambda m: m(query_embeds=queries, encoder_hidden_states=images, **mask).last_hidden_state, [queries, images],
        converted=1, compiles=False,
    )
    assert str(report).startswith("1 converted") and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
def test_idefics2_resampler(masked: bool) -> None:
    """RMSNorm, four heads of queries on two of keys, context and latents as one array."""
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    perceiver = {
        "hidden_size": 24, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }  # fmt: skip
    config = transformers.models.idefics2.configuration_idefics2.Idefics2PerceiverConfig(**perceiver)
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to fp32
    model, context = randomised(Idefics2PerceiverResampler(config)), media(2, 11, 24)
    mask = visible(2, 11) if masked else torch.ones(2, 11, dtype=torch.bool)
    assert_replaced(model, lambda m: m(context, mask), [context], converted=1, compiles=False)


def test_other_models_are_told_how() -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, vocab_size=30
    )
    model = nn.ModuleDict({"text": transformers.BertModel(config), "rest": nn.MultiheadAttention(16, 2)})
    report = replace_attention(model)
    (kept,) = report.kept
    assert (kept.name, kept.kind) == ("text", "transformers BertModel")
    assert "set_attn_implementation('perceiver_kernels')" in kept.reason
    assert [entry.name for entry in report.converted] == ["rest"]


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_language_model(padded: bool) -> None:
    """Grouped heads, causal masks with padding on the left, and a cache."""
    integration.register()
    integration.register()
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, vocab_size=50
    )
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to fp32
    model = randomised(transformers.LlamaForCausalLM(config)).eval()
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :3] = 0

    def run(m: nn.Module) -> Tensor:
        return m(ids, attention_mask=mask).logits[mask.bool()]

    expected = results(model, run, [])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, **options)
    model.set_attn_implementation("perceiver_kernels")
    assert_same(results(model, run, []), expected)
    assert torch.equal(model.generate(ids, **options), text)


def test_padding_stays_a_mask_of_keys_and_is_not_read() -> None:
    mask = integration.attention_mask_of(2, 5, 7, attention_mask=torch.ones(2, 6, dtype=torch.bool), device="cpu")
    assert mask is not None and mask.shape == (2, 1, 1, 7) and not mask[..., 6].any()
    assert integration.attention_mask_of(2, 5, 7, device="cpu") is None


def test_what_these_kernels_do_not_have_is_an_error() -> None:
    q = media(1, 2, 3, 8)
    with pytest.raises(ValueError, match="softcap must be None with attn_implementation='perceiver_kernels', got 30.0"):
        integration.attention_forward(nn.Module(), q, q, q, None, softcap=30.0)
