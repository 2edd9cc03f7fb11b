"""The Perceiver: a small latent array reads a long input array several times and is classified.

Source: Perceiver: General Perception with Iterative Attention, arXiv 2103.03206.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.models.encoder import PERCEIVER_PYTORCH, EncoderConfig, PerceiverEncoder
from perceiver_kernels.models.model import changed
from perceiver_kernels.nn import Linear
from perceiver_kernels.nn.attention import Method
from perceiver_kernels.nn.checks import check_count, check_flag


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(EncoderConfig):
    """Sizes of a Perceiver; the defaults are the paper's ImageNet model, but for ``input_dim`` and ``num_classes``.

    Args:
        num_classes: outputs of the head.
        head_norm: LayerNorm between the mean over the latents and the linear layer of the head.

    The other fields are those of ``EncoderConfig``.

    Source: arXiv 2103.03206, section 4; v1 and v2 are the paper's versions on arXiv.
    """

    num_classes: int
    head_norm: bool = False

    def __post_init__(self) -> None:
        check_count("num_classes", self.num_classes)
        check_flag("head_norm", self.head_norm)
        super().__post_init__()


class Perceiver(PerceiverEncoder):
    """An encoder whose latents are averaged and classified.

        z = PerceiverEncoder(inputs)             [B, N, D]
        logits = W (1/N) sum_n z_n + b

    Args:
        config: the sizes, see ``PerceiverConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: Perceiver, arXiv 2103.03206, section 3.
    """

    config: PerceiverConfig

    def __init__(
        self,
        config: PerceiverConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_norm = nn.LayerNorm(config.latent_dim, config.eps, **where) if config.head_norm else None
        self.head = Linear(config.latent_dim, config.num_classes, **where)

    @classmethod
    def imagenet(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> Perceiver:  # fmt: skip
        """The paper's ImageNet model: 50,176 pixels x (3 + 258 Fourier channels), 44.9M parameters, 707.2 GFLOP.

        Inputs: ``InputArray.image(images)``, whose default positions have 64 bands with the image's size as maximum
        resolution. 512 x 1024 latents, 8 interleaved cross-attends of one head, 8 blocks of 6 layers, 8 heads.

        Args:
            changes: other values for fields of ``PerceiverConfig``, for example ``num_cross_attends=1``.

        Source: arXiv 2103.03206, section 4.1.
        """
        published: dict[str, Any] = {"input_dim": 261, "num_classes": 1000}
        return cls(changed(PerceiverConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def audioset(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> Perceiver:  # fmt: skip
        """The paper's AudioSet model: 13,024 or 17,344 tokens of 487 channels, 2 cross-attends, 2 blocks of 8 layers.

        Inputs: token array of video patches (2 x 8 x 8 pixels, 384 channels, Fourier positions) and audio patches,
        both filled up to one width with a learned modality vector. Weights are not shared. 527 classes; train with a
        sigmoid per class. For one modality, give its own width as ``input_dim``.

        Source: arXiv 2103.03206, section 4.2; the width is that of Perceiver IO, arXiv 2107.14795.
        """
        published: dict[str, Any] = {
            "input_dim": 487, "num_classes": 527, "num_cross_attends": 2, "num_blocks": 2, "layers_per_block": 8,
            "weight_sharing": "none",
        }  # fmt: skip
        return cls(changed(PerceiverConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def modelnet40(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> Perceiver:  # fmt: skip
        """The paper's ModelNet40 model: about 2,000 points x 387 Fourier channels, 2 cross-attends, 2 blocks of 6 layers.

        Inputs: ``InputArray.points(coordinates)``, whose default positions have 64 bands for each of the three axes.
        The paper does not say how weights are shared: as for ImageNet here.

        Source: arXiv 2103.03206, section 4.3.
        """
        published: dict[str, Any] = {"input_dim": 387, "num_classes": 40, "num_cross_attends": 2, "num_blocks": 2}
        return cls(changed(PerceiverConfig, published, changes), device=device, dtype=dtype)

    @classmethod
    def perceiver_pytorch(
        cls, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **changes: Any
    ) -> Perceiver:  # fmt: skip
        """The model of lucidrains/perceiver-pytorch with the sizes of its README: 6 cross-attends, each before 2 layers.

        Inputs: ``InputArray.image(images, FourierPositions(6, (10.0, 10.0), order="perceiver-pytorch"))``. Its arguments are
        here: num_freq_bands and max_freq those of the positions, depth ``num_cross_attends`` and ``num_blocks``,
        self_per_cross_attn ``layers_per_block``, cross_dim_head ``qk_channels / cross_heads``, latent_dim_head
        ``latent_qk_channels / latent_heads``, attn_dropout ``attention_dropout``, ff_dropout ``dropout``, weight_tie_layers
        ``weight_sharing="v1"``. Without final_classifier_head it is a ``PerceiverEncoder``. Weights start as in the paper.

        Source: README of perceiver-pytorch 0.11.0, whose inverted attention and attention residuals are not here.
        """
        published: dict[str, Any] = {
            **PERCEIVER_PYTORCH, "input_dim": 29, "num_classes": 1000, "num_cross_attends": 6, "num_blocks": 6,
            "layers_per_block": 2, "head_norm": True,
        }  # fmt: skip
        return cls(changed(PerceiverConfig, published, changes), device=device, dtype=dtype)

    def forward(
        self,
        inputs: Tensor | InputArray | PackedInputs,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Classify every element of the batch.

        Args:
            inputs: InputArray (images, audio, video, points, tokens), PackedInputs, or a [B, M, C] tensor, C content and
                positions.
            key_mask: bool [B, M], True where a token is visible; for inputs that do not bring their own.
            lengths: int32 [B], visible leading tokens; excludes ``key_mask``.

        Returns:
            logits [B, num_classes].

        Raises:
            TypeError, ValueError: inputs of a wrong type, shape, dtype or device.
        """
        pooled = self.encode(inputs, key_mask, lengths).mean(dim=1)
        return self.head(pooled if self.head_norm is None else self.head_norm(pooled))

    def flops(self, batch: int, M: int, *, method: Method = "projected") -> int:
        """FLOPs of one forward over ``batch`` arrays of M tokens, a multiply and an add counted as two.

        Matrix products only, with keys and values projected as in the paper. The ImageNet model then takes 706.3 GFLOP
        for an image, a cross-attend 43.2; the paper states 707.2 and 43.3. The 0.13 % between are elementwise operations
        (softmax, LayerNorm, GELU, biases). ``method="absorbed"`` counts what the absorbed form does instead: 598.0.

        Source: arXiv 2103.03206, section 4.1 and its ablation of the number of cross-attends.
        """
        return self.encoder_flops(batch, M, method=method) + 2 * batch * self.config.latent_dim * self.config.num_classes
