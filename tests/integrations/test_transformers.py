"""transformers' attention interface: registration, masks, Q-Former and Idefics2 through it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perceiver_kernels import replace_attention
from tests.integrations.replaced import (
    DEVICES,
    Case,
    assert_accurate_in_bfloat16,
    assert_agree,
    assert_later_parts_run,
    assert_replaced,
    results,
)

transformers = pytest.importorskip("transformers", minversion="5.0")

from perceiver_kernels.integrations import transformers as integration  # noqa: E402

QFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "encoder_hidden_size": 24,
    "cross_attention_frequency": 1, "vocab_size": 30, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RESAMPLER: dict[str, Any] = {
    "hidden_size": 24, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip


def visible(*shape: int) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[:, 0] = True
    return mask


def q_former(**changes: Any) -> nn.Module:
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    config = transformers.Blip2QFormerConfig(**{**QFORMER, **changes})
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to fp32
    return Blip2QFormerModel(config)


def resampler(**changes: Any) -> nn.Module:
    """RMSNorm, four heads of queries on two of keys, context and latents as one array."""
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(**{**RESAMPLER, **changes})
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to fp32
    return Idefics2PerceiverResampler(config)


def read(model: nn.Module, **arrays: Tensor) -> Tensor:
    return model(**arrays).last_hidden_state


def resample(model: nn.Module, context: Tensor, attention_mask: Tensor) -> Tensor:
    return model(context, attention_mask)


def cases(queries: int, images: int, q_former_sizes: dict[str, int], resampler_sizes: dict[str, int]) -> dict[str, Case]:
    """Both readers, with and without padding."""
    found: dict[str, Case] = {}
    shapes = {
        "query_embeds": (2, queries, q_former_sizes.get("hidden_size", 32)), "encoder_hidden_states": (2, images, 24)
    }  # fmt: skip
    context = {"context": (2, images, resampler_sizes.get("hidden_size", 24))}
    for name, mask in (("", torch.ones(2, images, dtype=torch.bool)), (", masked", visible(2, images))):
        masks = {"encoder_attention_mask": mask} if name else {}
        found[f"Q-Former{name}"] = Case(
            functools.partial(q_former, **q_former_sizes), read, shapes, {"Blip2QFormerModel": 1},
            arrays=lambda masks=masks: masks,
        )  # fmt: skip
        found[f"Idefics 2{name}"] = Case(
            functools.partial(resampler, **resampler_sizes), resample, context, {"Idefics2PerceiverResampler": 1},
            arrays=lambda mask=mask: {"attention_mask": mask},
        )  # fmt: skip
    return found


CASES = cases(5, 11, {}, {})
LARGE = cases(
    64, 300, {"hidden_size": 128},
    {"hidden_size": 128, "resampler_n_latents": 64, "resampler_n_heads": 4, "resampler_head_dim": 32},
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_readers(name: str) -> None:
    case = CASES[name]
    report = assert_replaced(case, training=True)
    assert str(report).startswith("1 converted")
    model = case.model()
    replace_attention(model).undo()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LARGE)
def test_bfloat16(name: str, device: str) -> None:
    assert_accurate_in_bfloat16(LARGE[name], device)


@pytest.mark.parametrize("name", ["Q-Former, masked", "Idefics 2"])
def test_parts_that_are_replaced_later_run(name: str) -> None:
    assert_later_parts_run(CASES[name])


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
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :3] = 0

    def speak(model: nn.Module, **inputs: Tensor) -> Tensor:
        return model(**inputs).logits[inputs["attention_mask"].bool()]

    case = Case(
        lambda: transformers.LlamaForCausalLM(config), speak, {}, {}, arrays=lambda: {"input_ids": ids, "attention_mask": mask}
    )
    model = case.model()
    expected = results(case, model)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = model.generate(ids, **options)
    model.set_attn_implementation("perceiver_kernels")
    assert_agree(results(case, model), expected)
    assert torch.equal(model.generate(ids, **options), text)


def test_padding_stays_a_mask_of_keys_and_is_not_read() -> None:
    mask = integration.attention_mask_of(2, 5, 7, attention_mask=torch.ones(2, 6, dtype=torch.bool), device="cpu")
    assert mask is not None and mask.shape == (2, 1, 1, 7) and not mask[..., 6].any()
    assert integration.attention_mask_of(2, 5, 7, device="cpu") is None


def test_what_these_kernels_do_not_have_is_an_error() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="softcap must be None with attn_implementation='perceiver_kernels', got 30.0"):
        integration.attention_forward(nn.Module(), q, q, q, None, softcap=30.0)
