"""What the CUDA library refuses to be told: promises of the C interface whose breach would be a crash, as sentences."""

from __future__ import annotations

import pytest
import torch

from perceiver_kernels import build_info
from perceiver_kernels.backends import cuda

built = pytest.mark.skipif(
    not build_info.read()["cuda_built"], reason=f"CUDA library not built: {build_info.read()['reason']}"
)


@pytest.fixture
def binding():
    return cuda.binding()


def valid_fields(**changes):
    """A pack of [1, 4, 5] floats that is right in every way; its addresses are never followed without a GPU."""
    fields = {
        "content": 4096, "content_type": 0, "content_channels": 5, "stride_content_batch": 20,
        "stride_content_token": 5, "stride_content_channel": 1, "packed": 8192, "packed_type": 2,
        "packed_channels": 16, "batch": 1, "tokens": 4, "rows_per_tile": 8, "blocks": 1, "eps": 1e-5,
    }  # fmt: skip
    return fields | changes


def valid_pack_backward(**changes):
    """The gradient of 4 rows of 5 floats, packed in bf16."""
    fields = {
        "dpacked": 4096, "packed": 8192, "rstd": 12288, "dcontent": 16384, "rows": 4, "content_channels": 5, "channels": 5,
        "packed_channels": 16, "packed_type": 2, "content_type": 0, "normalize": 1, "rows_per_tile": 8,
        "blocks": 1,
    }  # fmt: skip
    return fields | changes


def valid_shared_kv(**changes):
    """Shared-KV attention of one query over 5 tokens of 16 bf16 channels."""
    fields = {
        "q": 4096, "stride_q_batch": 16, "stride_q_row": 16, "x": 8192, "stride_x_batch": 80, "stride_x_token": 16,
        "z_out": 16384, "lse_out": 32768, "batch": 1, "rows": 1, "tokens": 5, "channels": 16, "type": 2,
        "z_out_type": 0, "splits": 1, "tokens_per_split": 128, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


def valid_shared_kv_backward(**changes):
    """The gradients of shared-KV attention of one query over 5 tokens of 16 bf16 channels."""
    fields = {
        "q": 4096, "stride_q_batch": 16, "stride_q_row": 16, "dz": 8192, "stride_dz_batch": 16, "stride_dz_row": 16, "x": 12288,
        "stride_x_batch": 80, "stride_x_token": 16, "lse": 16384, "delta": 20480, "dq_out": 24576, "dx": 28672, "batch": 1,
        "rows": 1, "tokens": 5, "channels": 16, "type": 2, "dq_out_type": 0, "splits": 1, "tokens_per_split": 128, "blocks": 1,
        "scale": 0.7, "scale_log2": 1.0, "dq_scale": -0.7,
    }  # fmt: skip
    return fields | changes


def valid_products(**changes):
    fields = {
        "dz": 4096, "stride_dz_batch": 16, "stride_dz_row": 16, "z": 8192, "dlse": 12288, "delta": 16384, "batch": 1, "rows": 1,
        "channels": 16, "type": 2,
    }  # fmt: skip
    return fields | changes


def valid_attention(**changes):
    """Attention of one query over 5 keys of 16 bf16 channels."""
    fields = {f"stride_{name}_{axis}": 80 for name in ("query", "key", "value", "out") for axis in ("batch", "head")}
    fields |= {f"stride_{name}_row": 16 for name in ("query", "key", "value", "out")}
    fields |= {
        "query": 4096, "key": 8192, "value": 12288, "out": 16384, "lse_out": 32768, "batch": 1, "heads": 1,
        "heads_per_key_head": 1, "queries": 1, "keys": 5, "channels_qk": 16, "channels_v": 16, "type": 2, "out_type": 0,
        "block_kv": 128, "splits": 1, "keys_per_split": 128, "items": 1, "blocks": 1, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


def valid_attention_backward(**changes):
    """The gradients of attention of one query over 5 keys of 16 bf16 channels."""
    heads = ("query", "key", "value", "out", "dout", "dq", "dk", "dv")
    fields = {f"stride_{name}_{axis}": 80 for name in heads for axis in ("batch", "head")}
    fields |= {f"stride_{name}_row": 16 for name in heads}
    fields |= {name: 4096 * (i + 1) for i, name in enumerate((*heads, "lse", "rows", "dq_parts"))}
    fields |= {
        "batch": 1, "heads": 1, "heads_per_key_head": 1, "queries": 1, "keys": 5, "channels_qk": 16, "channels_v": 16,
        "type": 2, "query_blocks": 1, "splits": 1, "keys_per_split": 128, "slices": 1,
        "items": 1, "blocks": 1, "scale": 0.7, "scale_log2": 1.0,
    }  # fmt: skip
    return fields | changes


BALANCED = {
    "batch": 2, "keys": 300, "balanced_tiles": 3, "all_tiles": 6, "blocks": 4, "items": 8, "splits": 3, "keys_per_split": 300,
}  # fmt: skip
"""The same as two heads of three tiles, which four blocks share."""
CHUNKED = {"channels_v": 136, "chunk_rows": 128, "chunk_keys": 64, "tiles": 2**20}
"""Of the gradients of 136 channels, the same as chunks."""


def valid_merge(**changes):
    fields = {
        "z_part": 4096, "lse_part": 8192, "z": 16384, "lse": 32768, "rho": 65536, "batch": 1, "heads": 1, "splits": 2,
        "rows": 1, "channels": 16, "stride_z_batch": 16, "stride_z_head": 16, "stride_z_row": 16, "z_type": 2,
    }  # fmt: skip
    return fields | changes


@built
class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"content_channels": 1025, "packed_channels": 1040}, "must have 1 to 1024 channels together"),
            ({"content_channels": 0}, "must have 1 to 1024 channels together"),
            ({"packed_channels": 12}, "packed_channels must be a multiple of 16"),
            ({"packed_channels": 32}, "packed_channels must be the channels rounded up to 16"),
            ({"content_type": 3}, "element types must be 0"),
            ({"batch": -1}, "must not be negative"),
            ({"rows_per_tile": 0}, "rows_per_tile and blocks must be positive"),
            ({"tokens": 2**40}, "must be below 2\\^30"),
            ({"packed": 0}, "a pointer is null"),
            ({"normalize": 1, "rstd": 0}, "a pointer is null"),
            ({"packed": 8200}, "packed must lie on 16 bytes"),
            ({"flat": 1, "content": 4104}, "every tile to start on 16 bytes"),
            ({"flat": 1, "rows_per_tile": 3}, "every tile to start on 16 bytes"),
            ({"flat": 1, "batch": 2}, "one run, batch 1 and no positions"),
            ({"flat": 1, "stride_content_token": 6}, "one run, batch 1 and no positions"),
        ],
    )
    def test_broken_promise_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.PackForwardParams(), valid_fields(**changes))
        with pytest.raises(RuntimeError, match=f"pack_inputs_fwd: .*{sentence}"):
            binding.pack_inputs_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"content_channels": 6}, "channels must hold content_channels"),
            ({"packed_channels": 12}, "packed_channels must be a multiple of 16"),
            ({"packed_type": 3}, "element types must be 0"),
            ({"rows": -1}, "rows must not be negative"),
            ({"rows_per_tile": 6}, "rows_per_tile must be a multiple of 8, of 4 with float32"),
            ({"rows_per_tile": 12, "content_type": 2}, "rows_per_tile must be a multiple of 8, of 4 with float32"),
            ({"rows_per_tile": 256, "content_channels": 64, "channels": 64, "packed_channels": 64}, "at most 8192 elements"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"rows": 2**40}, "must be below 2\\^30"),
            ({"rstd": 0}, "a pointer is null"),
            ({"dcontent": 16388}, "must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_packs_backward_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.PackBackwardParams(), valid_pack_backward(**changes))
        with pytest.raises(RuntimeError, match=f"pack_inputs_bwd: .*{sentence}"):
            binding.pack_inputs_bwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"channels": 520}, "channels must be at most 512"),
            ({"channels": 12}, "channels must be a multiple of 8"),
            ({"rows": -1}, "sizes must not be negative"),
            ({"type": 0}, "type must be 1"),
            ({"z_out_type": 1}, "z_out_type must be 0"),
            ({"splits": 2, "tokens_per_split": 80}, "of whole tiles of tokens"),
            ({"tokens_per_split": 4}, "must cover the tokens"),
            ({"batch": 2**30, "rows": 257}, "fewer than 2\\^31 blocks"),
            ({"scale_log2": 0.0}, "scale_log2 must be positive"),
            ({"tokens": 0}, "there must be tokens"),
            ({"x": 0}, "a pointer is null"),
            ({"q": 4104}, "a base and pitches of 16 bytes"),
            ({"stride_x_token": 20}, "a base and pitches of 16 bytes"),
            ({"batch": 2, "stride_x_batch": 84}, "a base and pitches of 16 bytes"),
            ({"z_out": 16388}, "z_out must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_shared_kv_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.SharedKVForwardParams(), valid_shared_kv(**changes))
        with pytest.raises(RuntimeError, match=f"shared_kv_fwd: .*{sentence}"):
            binding.shared_kv_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"channels": 344}, "channels must be at most 336"),
            ({"channels": 12}, "channels must be a multiple of 8"),
            ({"type": 0}, "type must be 1"),
            ({"dq_out_type": 1}, "dq_out_type must be 0"),
            ({"splits": 2, "tokens_per_split": 80}, "of whole tiles of tokens"),
            ({"tokens_per_split": 4}, "must cover the tokens"),
            ({"batch": 2**30, "rows": 257}, "fewer than 2\\^31 blocks"),
            ({"batch": 2**29, "tokens": 257, "tokens_per_split": 512}, "fewer than 2\\^30 blocks of tokens"),
            ({"scale": 0.0}, "scale and scale_log2 must be positive"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"delta": 0}, "a pointer is null"),
            ({"dz": 4104}, "a base and pitches of 16 bytes"),
            ({"stride_x_token": 20}, "a base and pitches of 16 bytes"),
            ({"dx": 16388}, "gradients must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_the_gradients_of_shared_kv_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.SharedKVBackwardParams(), valid_shared_kv_backward(**changes))
        with pytest.raises(RuntimeError, match=f"shared_kv_bwd: .*{sentence}"):
            binding.shared_kv_bwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"channels": 6}, "a positive multiple of 4"),
            ({"type": 0}, "type must be 1"),
            ({"z": 0}, "a pointer is null"),
            ({"batch": 2**20, "rows": 2**12}, "fewer than 2\\^31 rows"),
            ({"stride_dz_row": 12}, "dz and z must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_row_products_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.RowProductsParams(), valid_products(**changes))
        with pytest.raises(RuntimeError, match=f"row_products: .*{sentence}"):
            binding.row_products(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 0}, "heads and channels positive"),
            ({"channels_v": 264}, "channels must be at most 256"),
            ({"channels_qk": 12}, "channels must be multiples of 8"),
            ({"heads": 3, "heads_per_key_head": 2}, "heads_per_key_head must divide heads"),
            ({"type": 0}, "type must be 1"),
            ({"out_type": 1}, "out_type must be 0"),
            ({"block_kv": 64}, "block_kv must be the keys of a tile"),
            ({"block_kv": 192, "channels_v": 72}, "block_kv must be the keys of a tile"),
            ({"splits": 2, "keys_per_split": 80}, "of whole tiles of keys"),
            ({"keys_per_split": 4}, "must cover the keys"),
            ({"items": 2}, "items must be all blocks"),
            ({"scale_log2": -1.0}, "scale_log2 must be positive"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"keys": 0}, "there must be keys"),
            ({"value": 0}, "a pointer is null"),
            ({"key": 4104}, "a base and pitches of 16 bytes"),
            ({"stride_value_row": 20}, "a base and pitches of 16 bytes"),
            ({"out": 16388}, "out must lie on 16 bytes"),
            ({"stride_out_row": 12}, "out must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_attention_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.AttentionForwardParams(), valid_attention(**changes))
        with pytest.raises(RuntimeError, match=f"attention_fwd: .*{sentence}"):
            binding.attention_fwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 0}, "heads and channels positive"),
            ({"channels_v": 264}, "channels must be at most 256"),
            ({"channels_qk": 12}, "channels must be multiples of 8"),
            ({"heads": 3, "heads_per_key_head": 2}, "heads_per_key_head must divide heads"),
            ({"type": 0}, "type must be 1"),
            ({"splits": 2, "keys_per_split": 80}, "of whole tiles of keys"),
            ({"keys_per_split": 4}, "must cover the keys, and none be empty"),
            ({"splits": 2, "items": 2}, "must cover the keys, and none be empty"),
            ({"query_blocks": 2}, "query_blocks must cover the queries"),
            ({"queries": 2**30, "query_blocks": 2**23, "heads": 64, "items": 64}, "fewer than 2\\^29 blocks of queries"),
            ({"items": 2}, "items must be all splits and slices of all heads"),
            ({"slices": 0}, "slices must be positive"),
            ({"slices": 2, "items": 2}, "no slice may be empty"),
            ({"slices": 2, "items": 2, "queries": 129, "query_blocks": 2}, "slices need a head of keys for every head"),
            ({"keys": 129, "keys_per_split": 256, "dq_parts": 0}, "a pointer is null"),
            (BALANCED | {"all_tiles": 5}, "must be those of the keys"),
            (BALANCED | {"slices": 2}, "balanced tiles have no slices"),
            (BALANCED | {"blocks": 1}, "no more than a head has"),
            (BALANCED | {"blocks": 7, "items": 14}, "blocks must have tiles"),
            (BALANCED | {"items": 4}, "items must be two of every block"),
            (BALANCED | {"splits": 2}, "splits must be the most blocks that a head has"),
            (BALANCED | {"dq_parts": 0}, "a pointer is null"),
            (CHUNKED | {"chunk_rows": 0}, "chunks must have rows and keys"),
            (CHUNKED | {"queries": 200, "query_blocks": 7, "chunk_rows": 100}, "chunks must be whole blocks"),
            (CHUNKED | {"queries": 200, "query_blocks": 7, "keys": 65, "chunk_keys": 64}, "all rows or all keys"),
            (CHUNKED | {"slices": 0}, "splits and slices must be positive"),
            (CHUNKED | {"tiles": 0}, "a pointer is null"),
            (CHUNKED | {"splits": 2, "dq_parts": 0}, "a pointer is null"),
            (CHUNKED | {"slices": 2}, "a pointer is null"),
            ({"scale": -1.0}, "scale and scale_log2 must be positive"),
            ({"blocks": 0}, "blocks must be positive"),
            ({"keys": 0}, "none be empty"),
            ({"dout": 0}, "a pointer is null"),
            ({"dq": 0}, "a pointer is null"),
            ({"key": 4104}, "a base and pitches of 16 bytes"),
            ({"queries": 2, "stride_dout_row": 20}, "a base and pitches of 16 bytes"),
            ({"stride_dk_row": 12}, "a base and pitches of 16 bytes"),
            ({"rows": 4100}, "out and workspaces must lie on 16 bytes"),
            ({"stride_out_row": 12}, "out and workspaces must lie on 16 bytes"),
        ],
    )
    def test_broken_promise_of_attentions_backward_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.AttentionBackwardParams(), valid_attention_backward(**changes))
        with pytest.raises(RuntimeError, match=f"attention_bwd: .*{sentence}"):
            binding.attention_bwd(params)

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"heads": 2}, "heads must divide batch"),
            ({"channels": 6}, "a positive multiple of 4"),
            ({"z_type": 5}, "z_type must be 0"),
            ({"lse_state": 4096}, "an earlier state is z_state and lse_state"),
            ({"z_part": 0}, "a pointer is null"),
            ({"lse": 0}, "sums have no lse and no rho"),
            ({"lse": 0, "rho": 0, "lse_part": 0, "z_part": 0}, "a pointer is null"),
            ({"z": 8}, "on 16 bytes everywhere"),
        ],
    )
    def test_broken_promise_of_a_merge_is_a_sentence(self, binding, changes, sentence):
        params = cuda.filled(binding.MergeStatesParams(), valid_merge(**changes))
        with pytest.raises(RuntimeError, match=f"merge_states: .*{sentence}"):
            binding.merge_states(params)

    @pytest.mark.parametrize("empty", ["batch", "rows"])
    def test_no_rows_are_nothing_to_do(self, binding, empty):
        binding.shared_kv_fwd(cuda.filled(binding.SharedKVForwardParams(), valid_shared_kv(**{empty: 0})))
        binding.shared_kv_bwd(cuda.filled(binding.SharedKVBackwardParams(), valid_shared_kv_backward(**{empty: 0})))
        binding.row_products(cuda.filled(binding.RowProductsParams(), valid_products(**{empty: 0})))
        binding.merge_states(cuda.filled(binding.MergeStatesParams(), valid_merge(**{empty: 0})))
        of_attention = valid_attention(**{{"rows": "queries"}.get(empty, empty): 0}, items=0)
        binding.attention_fwd(cuda.filled(binding.AttentionForwardParams(), of_attention))

    @pytest.mark.parametrize("empty", ["batch", "tokens"])
    def test_nothing_to_do_returns_before_the_driver_is_asked(self, binding, empty):
        binding.pack_inputs_fwd(cuda.filled(binding.PackForwardParams(), valid_fields(**{empty: 0})))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
    def test_missing_driver_is_named(self, binding):
        params = cuda.filled(binding.PackForwardParams(), valid_fields())
        with pytest.raises(
            RuntimeError, match=r"no NVIDIA driver is loaded.*cudaErrorInsufficientDriver, 35"
        ):
            binding.pack_inputs_fwd(params)
