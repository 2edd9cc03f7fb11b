"""The encoder of the whole family: a small latent array reads a long input array, once or several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perceiver_kernels import functional
from perceiver_kernels.functional.common import autocast_dtype, visible
from perceiver_kernels.functional.cross_attention import check_reading
from perceiver_kernels.inputs import InputArray, PackedInputs
from perceiver_kernels.models.model import Model
from perceiver_kernels.nn import CrossBlock, LatentBlock
from perceiver_kernels.nn.attention import Method
from perceiver_kernels.nn.called import is_plain
from perceiver_kernels.nn.checkpointing import run_block
from perceiver_kernels.nn.checks import check_array, check_choice, check_count, check_flag, check_input_dim, check_widths
from perceiver_kernels.nn.feed_forward import Activation, check_activation
from perceiver_kernels.problem import check_eps, check_probability

WeightSharing = Literal["v1", "v2", "none"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder; the defaults are those of the Perceiver's ImageNet model, but for ``input_dim``.

    Args:
        input_dim: C, channels of the inputs, content and positions together, at most 1024.
        num_latents: N.
        latent_dim: D.
        num_cross_attends: how often the latents read the inputs.
        num_blocks: latent transformer blocks.
        layers_per_block: self-attention layers (``nn.LatentBlock``) in each of them.
        cross_heads: heads of cross-attention.
        latent_heads: heads of self-attention.
        qk_channels: width of the cross-attention's queries and keys, all heads together; ``input_dim`` when None.
        v_channels: of its values, likewise.
        latent_qk_channels: width of the self-attention's queries and keys, all heads together; ``latent_dim`` when None.
        latent_v_channels: of its values, likewise.
        qkv_bias: biases of the query, key and value projections of all attention layers.
        cross_residual: add the latents to what they read from the inputs.
        cross_attends: "interleaved" spaces them evenly between the blocks, "leading" puts one before each of the first
            blocks, "start" all before the first block.
        weight_sharing: "v2", all blocks share weights; "v1", all but the first; "none". With either of the first two,
            all cross-attends but the first share weights too.
        cross_weight_sharing: of the cross-attends, where it is not as ``weight_sharing`` says: "v2", all share weights; "v1",
            all but the first; "none".
        cross_widening_factor: of the feed-forward layers after cross-attention.
        latent_widening_factor: of the feed-forward layers of the latent blocks.
        activation: of the feed-forward layers, see ``nn.FeedForward``.
        attention_dropout: of the attention weights.
        dropout: of the results of attention and feed-forward layers, before their residuals.
        out_dropout: of the attention's results, where it is not as ``dropout`` says.
        input_dropout: share of the visible input tokens that a forward leaves out in training, others for every array; one
            remains. Not beside ``chunk_size``.
        eps: of every LayerNorm.
        chunk_size: the inputs are packed and read this many tokens at a time, at every cross-attend, so that memory
            does not grow with their number; None packs them once per forward.
        method: "absorbed" or "projected" cross-attention, None to let the planner choose.
        activation_checkpointing: in training, keep only the inputs of every block and compute it again for its gradient.

    Source: arXiv 2103.03206, section 4; v1 and v2 are the paper's versions on arXiv.
    """

    input_dim: int
    num_latents: int = 512
    latent_dim: int = 1024
    num_cross_attends: int = 8
    num_blocks: int = 8
    layers_per_block: int = 6
    cross_heads: int = 1
    latent_heads: int = 8
    qk_channels: int | None = None
    v_channels: int | None = None
    latent_qk_channels: int | None = None
    latent_v_channels: int | None = None
    qkv_bias: bool = True
    cross_residual: bool = True
    cross_attends: Literal["interleaved", "leading", "start"] = "interleaved"
    weight_sharing: WeightSharing = "v2"
    cross_weight_sharing: WeightSharing | None = None
    cross_widening_factor: int = 1
    latent_widening_factor: int = 1
    activation: Activation = "gelu"
    attention_dropout: float = 0.0
    dropout: float = 0.0
    out_dropout: float | None = None
    input_dropout: float = 0.0
    eps: float = 1e-5
    chunk_size: int | None = None
    method: Method | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_input_dim(self.input_dim)
        for name in (
            "num_latents", "latent_dim", "num_cross_attends", "cross_widening_factor", "latent_widening_factor",
        ):  # fmt: skip
            check_count(name, getattr(self, name))
        for name in ("num_blocks", "layers_per_block"):
            check_count(name, getattr(self, name), 0)
        check_choice("cross_attends", self.cross_attends, ("interleaved", "leading", "start"))
        check_choice("weight_sharing", self.weight_sharing, ("v1", "v2", "none"))
        if self.cross_weight_sharing is not None:
            check_choice("cross_weight_sharing", self.cross_weight_sharing, ("v1", "v2", "none"))
        check_activation(self.activation)
        if self.cross_attends != "start" and self.num_cross_attends > max(self.num_blocks, 1):
            raise ValueError(
                f"num_cross_attends must be at most num_blocks={self.num_blocks} when {self.cross_attends}, got "
                f'{self.num_cross_attends}; cross_attends="start" takes any number'
            )
        qk_channels = self.input_dim if self.qk_channels is None else self.qk_channels
        v_channels = qk_channels if self.v_channels is None else self.v_channels
        check_widths(self.cross_heads, qk_channels=qk_channels, v_channels=v_channels)
        if self.latent_qk_channels is None:
            check_widths(self.latent_heads, latent_dim=self.latent_dim)
        else:
            check_widths(self.latent_heads, latent_qk_channels=self.latent_qk_channels)
        if self.latent_v_channels is not None:
            check_widths(self.latent_heads, latent_v_channels=self.latent_v_channels)
        check_flag("qkv_bias", self.qkv_bias)
        check_flag("cross_residual", self.cross_residual)
        check_flag("activation_checkpointing", self.activation_checkpointing)
        check_probability("attention_dropout", self.attention_dropout)
        check_probability("dropout", self.dropout)
        check_probability("out_dropout", self.attention_result_dropout)
        check_probability("input_dropout", self.input_dropout)
        check_eps(self.eps)
        check_reading(self.chunk_size, self.method)
        if self.input_dropout and self.chunk_size is not None:
            raise ValueError(f"input_dropout must be 0 with chunk_size={self.chunk_size}, got {self.input_dropout}")

    @property
    def attention_result_dropout(self) -> float:
        """``out_dropout``, or ``dropout`` where that is None."""
        return self.dropout if self.out_dropout is None else self.out_dropout

    def cross_weights(self) -> tuple[int, ...]:
        """For every cross-attend, which of the distinct cross modules it uses."""
        paper: WeightSharing = "none" if self.weight_sharing == "none" else "v1"
        return _shared(self.num_cross_attends, self.cross_weight_sharing or paper)

    def block_weights(self) -> tuple[int, ...]:
        """For every latent block, which of the distinct blocks it uses."""
        return _shared(self.num_blocks, self.weight_sharing)

    def schedule(self) -> tuple[tuple[Literal["cross", "block"], int], ...]:
        """The model's steps in order, as (kind, which of the distinct modules of that kind)."""
        crosses, blocks = self.cross_weights(), self.block_weights()
        # Cross-attend i comes before this block; the first one always before everything else.
        before = [
            {"interleaved": i * self.num_blocks // len(crosses), "leading": i, "start": 0}[self.cross_attends]
            for i in range(len(crosses))
        ]
        steps: list[tuple[Literal["cross", "block"], int]] = []
        for i_block in range(max(self.num_blocks, 1)):
            steps += [("cross", cross) for cross, place in zip(crosses, before, strict=True) if place == i_block]
            steps += [("block", block) for block in blocks[i_block : i_block + 1]]
        return tuple(steps)


# lucidrains/perceiver-pytorch, with what the examples of its README have in common.
PERCEIVER_PYTORCH: dict[str, Any] = {
    "num_latents": 256, "latent_dim": 512, "qk_channels": 64, "latent_qk_channels": 512, "qkv_bias": False,
    "weight_sharing": "none", "cross_widening_factor": 4, "latent_widening_factor": 4, "activation": "geglu",
    "out_dropout": 0.0,
}  # fmt: skip


def _shared(count: int, sharing: WeightSharing) -> tuple[int, ...]:
    """For every one of ``count`` steps, which of the distinct modules it uses."""
    last = {"none": count, "v1": 1, "v2": 0}[sharing]
    return tuple(min(step, last) for step in range(count))


class PerceiverEncoder(Model):
    """Learned latents read the inputs by cross-attention, transform themselves, and repeat.

        z_0 = learned latents [1, N, D]
        z <- CrossBlock(z, inputs)               every cross-attend: z + attention, then z + feed-forward
        z <- LatentBlock(z), layers_per_block times

    The inputs are normalised and packed once per forward and reused by all cross-attends, whose weights and LayerNorm
    scales act on the latent side. Latents are one set for the whole batch until they have read something: the first
    query is projected once.

    Args:
        config: the sizes, see ``EncoderConfig``.
        device: of the parameters.
        dtype: of the parameters.

    Source: Perceiver, arXiv 2103.03206, section 3.1. Linear layers start as in DeepMind's code,
    latents as in the paper: truncated normal, standard deviation 0.02, cut at +-2.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {
            "activation": config.activation, "attention_dropout": config.attention_dropout, "dropout": config.dropout,
            "out_dropout": config.attention_result_dropout, "qkv_bias": config.qkv_bias, "eps": config.eps, **where,
        }  # fmt: skip
        self.latents = nn.Parameter(torch.empty(1, config.num_latents, config.latent_dim, **where))
        self.reset_parameters()
        self.cross_blocks = nn.ModuleList(
            CrossBlock(
                config.latent_dim, config.input_dim, num_heads=config.cross_heads, qk_channels=config.qk_channels,
                v_channels=config.v_channels, widening_factor=config.cross_widening_factor,
                residual=config.cross_residual, chunk_size=config.chunk_size, method=config.method, **shared,
            )
            for _ in range(max(config.cross_weights()) + 1)
        )  # fmt: skip
        self.latent_blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    LatentBlock(
                        config.latent_dim, config.latent_heads, qk_channels=config.latent_qk_channels,
                        v_channels=config.latent_v_channels, widening_factor=config.latent_widening_factor, **shared,
                    )
                    for _ in range(config.layers_per_block)
                )
            )
            for _ in range(max(config.block_weights(), default=-1) + 1)
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Start the latents; layers have a method of their own."""
        nn.init.trunc_normal_(self.latents, std=0.02, a=-2.0, b=2.0)

    def forward(
        self,
        inputs: Tensor | InputArray | PackedInputs,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Read an input array.

        Args:
            inputs: InputArray (images, audio, video, points, tokens), PackedInputs, or a [B, M, C] tensor, C content and
                positions.
            key_mask: bool [B, M], True where a token is visible; for inputs that do not bring their own.
            lengths: int32 [B], visible leading tokens; excludes ``key_mask``.

        Returns:
            The latents [B, N, D] after all blocks.

        Raises:
            TypeError, ValueError: inputs of a wrong type, shape, dtype or device.
        """
        return self.encode(inputs, key_mask, lengths)

    def encode(
        self,
        inputs: Tensor | InputArray | PackedInputs,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The latents [B, N, D] after all blocks, from the inputs that ``PerceiverEncoder.forward`` takes."""
        prepared = self._prepare(inputs, key_mask, lengths)
        if prepared is not inputs:
            # What was packed here carries its masks.
            key_mask, lengths = None, None
        if self.config.input_dropout and self.training and isinstance(prepared, PackedInputs):
            prepared = _thinned(prepared, 1.0 - self.config.input_dropout)
        latents: Tensor = self.latents
        checkpointing = self.config.activation_checkpointing
        for kind, index in self.schedule:
            if kind == "cross":
                latents = run_block(self.cross_blocks[index], latents, prepared, key_mask, lengths, checkpointing=checkpointing)
            else:
                latents = run_block(self.latent_blocks[index], latents, checkpointing=checkpointing)
        return latents

    def _prepare(
        self, inputs: Tensor | InputArray | PackedInputs, key_mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor | InputArray | PackedInputs:
        """Check the channels and pack, unless the cross-attends are to pack chunk by chunk, or to call their norm."""
        check_array("inputs", inputs, "B, M, C", "input_dim", self.config.input_dim)
        if isinstance(inputs, PackedInputs) or self.config.chunk_size is not None:
            return inputs
        device = self.latents.device
        if inputs.device != device:
            raise ValueError(f"inputs must be on {device} as the model, unless chunk_size is set, got {inputs.device}")
        # The packed array has the dtype that the products run in, whatever the dtype of the content.
        dtype = autocast_dtype(self.latents) or self.latents.dtype
        thins = self.config.input_dropout and self.training
        blocks: Any = self.cross_blocks
        if not (thins or is_plain(*(block.attention.norm_inputs for block in blocks))):
            return inputs
        return functional.pack_inputs(inputs, key_mask=key_mask, lengths=lengths, eps=self.config.eps, dtype=dtype)

    def encoder_flops(self, batch: int, M: int, *, method: Method = "projected") -> int:
        """FLOPs of the matrix products of ``encode`` over arrays of M tokens, a multiply and an add counted as two."""
        config, total, latent_batch = self.config, 0, 1
        for kind, index in self.schedule:
            if kind == "cross":
                cross: Any = self.cross_blocks[index]
                total += cross.flops(batch, config.num_latents, M, latent_batch=latent_batch, method=method)
                latent_batch = batch
            else:
                layers: Any = self.latent_blocks[index]
                total += sum(layer.flops(batch, config.num_latents) for layer in layers)
        return total


def _thinned(packed: PackedInputs, share: float) -> PackedInputs:
    """A ``share`` of the tokens of every array, or of those that are visible, drawn from torch's generator."""
    B, M, C = packed.data.shape
    seen = visible(packed.key_mask, packed.lengths, M)
    chance = torch.randn(B, M, device=packed.data.device)
    if seen is not None:
        chance = chance.masked_fill(~seen, -torch.inf)
    # Visible tokens come first, so that those that remain are a prefix.
    kept = chance.topk(min(M, max(1, int(share * M))), dim=1).indices
    lengths = None if seen is None else torch.ceil(seen.sum(1) * share).int()
    data = packed.data.gather(1, kept[..., None].expand(-1, -1, C))
    return PackedInputs(data, packed.channels, packed.normalized, lengths=lengths, constants=packed.constants)
