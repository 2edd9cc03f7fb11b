#include "rules.h"

#include "kernels/attention_enqueue.h"
#include "kernels/shared_kv_enqueue.h"

namespace perceiver {
namespace {

bool is_element_type(int32_t type) {
  return type >= static_cast<int32_t>(ElementType::kFloat32) &&
         type <= static_cast<int32_t>(ElementType::kBFloat16);
}

bool is_half(int32_t type) {
  return type == static_cast<int32_t>(ElementType::kFloat16) || type == static_cast<int32_t>(ElementType::kBFloat16);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool can_encode_all(std::initializer_list<RowTensor> tensors) {
  for (const RowTensor& tensor : tensors) {
    if (!can_encode(tensor)) return false;
  }
  return true;
}

// What both passes of attention ask of sizes; heads of `columns` channels.
template <class Params>
const char* broken_size(const Params& p, int columns, const char* widest) {
  if (p.batch < 0 || p.heads < 1 || p.queries < 0 || p.keys < 0 || p.channels_qk < 1 || p.channels_v < 1) {
    return "sizes must not be negative, heads and channels positive";
  }
  if (columns == 0) return widest;
  if (p.channels_qk % 8 != 0 || p.channels_v % 8 != 0) return "channels must be multiples of 8";
  if (p.heads_per_key_head < 1 || p.heads % p.heads_per_key_head != 0) return "heads_per_key_head must divide heads";
  return is_half(p.type) ? nullptr : "type must be 1 (float16) or 2 (bfloat16)";
}

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

bool is_half_or_float(int32_t out_type, int32_t type) {
  return out_type == type || out_type == static_cast<int32_t>(ElementType::kFloat32);
}

// What both passes of shared-KV attention ask of sizes; rows of `columns` channels, 0 where there are `too_many`.
template <class Params>
const char* broken_rows(const Params& p, int columns, const char* too_many) {
  if (p.batch < 0 || p.rows < 0 || p.tokens < 0 || p.channels < 1) return "sizes must not be negative, channels positive";
  if (columns == 0) return too_many;
  if (!is_half(p.type)) return "type must be 1 (float16) or 2 (bfloat16)";
  return p.channels % 8 == 0 ? nullptr : "channels must be a multiple of 8";
}

template <class Params>
const char* broken_splits(const Params& p, int block_kv, int block_q) {
  if (p.splits < 1 || p.tokens_per_split < 1 || (p.splits > 1 && p.tokens_per_split % block_kv != 0)) {
    return "splits must be positive, and of whole tiles of tokens";
  }
  if (int64_t{p.splits} * p.tokens_per_split < p.tokens) return "the splits must cover the tokens";
  if (int64_t{p.batch} * p.splits * ((int64_t{p.rows} + block_q - 1) / block_q) > kMostBlocks) {
    return "there must be fewer than 2^31 blocks";
  }
  return nullptr;
}

// Whether rows of a gradient or result of heads start on 16 bytes.
bool rows_aligned(const void* data, int64_t batch, int64_t head, int64_t row) {
  return is_aligned(data) && batch % 8 == 0 && head % 8 == 0 && row % 8 == 0;
}

// Of the kernels for up to 128 channels, whose blocks have as many tiles each.
const char* broken_balance(const AttentionBackwardParams& p) {
  const int64_t tiles = (int64_t{p.keys} + kAttentionBackwardBlockKV - 1) / kAttentionBackwardBlockKV;
  if (p.balanced_tiles != tiles || p.all_tiles != tiles * p.batch * (p.heads / p.heads_per_key_head)) {
    return "balanced_tiles and all_tiles must be those of the keys";
  }
  if (p.slices != 1) return "balanced tiles have no slices";
  if (p.blocks < 1 || p.all_tiles < p.blocks || int64_t{p.all_tiles} > tiles * p.blocks) {
    return "blocks must have tiles, and no more than a head has";
  }
  if ((int64_t{p.all_tiles} + 1) * (p.blocks + 1) >= int64_t{1} << 32) return "there are too many tiles to be balanced";
  if (p.items != 2 * int64_t{p.blocks}) return "items must be two of every block";
  if (p.splits < (tiles - 1) * p.blocks / p.all_tiles + 2) return "splits must be the most blocks that a head has";
  return p.dq_parts == nullptr ? "a pointer is null" : nullptr;
}

// Of the same, with splits and slices that are alike.
const char* broken_split(const AttentionBackwardParams& p) {
  if (p.slices < 1) return "slices must be positive";
  if (p.splits < 1 || p.keys_per_split < 1 || (p.splits > 1 && p.keys_per_split % kAttentionBackwardBlockKV != 0)) {
    return "splits must be positive, and of whole tiles of keys";
  }
  if (int64_t{p.splits} * p.keys_per_split < p.keys || int64_t{p.splits - 1} * p.keys_per_split >= p.keys) {
    return "the splits must cover the keys, and none be empty";
  }
  if (int64_t{p.batch} * (p.heads / p.heads_per_key_head) * p.splits * p.slices != p.items) {
    return "items must be all splits and slices of all heads";
  }
  const int64_t blocks_per_slice = (int64_t{p.query_blocks} + p.slices - 1) / p.slices;
  if (p.queries > 0 && (p.slices - 1) * blocks_per_slice >= p.query_blocks) return "no slice may be empty";
  if (p.slices > 1 && (p.heads_per_key_head > 1 || p.key_parts == nullptr)) {
    return "slices need a head of keys for every head, and a workspace";
  }
  const bool has_parts = p.splits > 1 || p.keys > kAttentionBackwardBlockKV;
  return has_parts && p.items > 0 && p.dq_parts == nullptr ? "a pointer is null" : nullptr;
}

// Of those for 256: all rows and some keys at a time, or some rows and all keys.
const char* broken_chunk(const AttentionBackwardParams& p) {
  if (p.chunk_rows < 1 || p.chunk_keys < 1) return "chunks must have rows and keys";
  const bool whole_rows = p.chunk_rows >= p.queries, whole_keys = p.chunk_keys >= p.keys;
  if ((!whole_rows && p.chunk_rows % kAttentionWideBlockQ != 0) || (!whole_keys && p.chunk_keys % kAttentionWideBlockKV != 0)) {
    return "chunks must be whole blocks";
  }
  if (!whole_rows && !whole_keys) return "a chunk must have all rows or all keys";
  if (p.splits < 1 || p.slices < 1) return "splits and slices must be positive";
  if (p.tiles == nullptr) return "a pointer is null";
  if ((p.splits > 1 || !whole_keys) && p.dq_parts == nullptr) return "a pointer is null";
  return (p.slices > 1 || !whole_rows) && p.key_parts == nullptr ? "a pointer is null" : nullptr;
}

}  // namespace

const char* broken_rule(const PackForwardParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t channels = int64_t{p.content_channels} + p.position_channels;
  if (p.content_channels < 0 || p.position_channels < 0 || channels < 1 || channels > kMaxChannels) {
    return "content and positions must have 1 to 1024 channels together";
  }
  if (p.packed_channels < channels || p.packed_channels > kMaxChannels ||
      p.packed_channels % kChannelMultiple != 0) {
    return "packed_channels must be a multiple of 16 that holds the channels";
  }
  if (p.packed_channels - channels >= kChannelMultiple) {
    return "packed_channels must be the channels rounded up to 16";
  }
  if (!is_element_type(p.content_type) || !is_element_type(p.positions_type) ||
      !is_element_type(p.packed_type)) {
    return "element types must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  }
  if (p.batch < 0 || p.tokens < 0 || p.batch >= kLimit) {
    return "batch and tokens must not be negative, batch below 2^31";
  }
  if (p.batch == 0 || p.tokens == 0) return nullptr;
  if (p.rows_per_tile < 1 || p.blocks < 1) return "rows_per_tile and blocks must be positive";
  if (p.batch * (p.tokens / p.rows_per_tile + 1) >= kLimit / 2) return "batch * tokens / rows_per_tile must be below 2^30";
  if ((p.content == nullptr && p.content_channels > 0) ||
      (p.positions == nullptr && p.position_channels > 0) || p.packed == nullptr ||
      (p.rstd == nullptr && p.normalize != 0)) {
    return "a pointer is null";
  }
  if (!is_aligned(p.packed)) return "packed must lie on 16 bytes";
  if (!p.flat) return nullptr;
  const int64_t element_bytes = p.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 2;
  if (p.position_channels != 0 || p.batch != 1 || p.stride_content_channel != 1 || p.stride_content_token != p.content_channels) {
    return "a flat pack needs content that is one run, batch 1 and no positions";
  }
  if (!is_aligned(p.content) || p.rows_per_tile * p.content_channels * element_bytes % 16 != 0) {
    return "a flat pack needs every tile to start on 16 bytes";
  }
  return nullptr;
}

const char* broken_rule(const PackBackwardParams& p) {
  if (p.content_channels < 0 || p.channels < 1 || p.content_channels > p.channels || p.channels > p.packed_channels) {
    return "channels must hold content_channels, and packed_channels the channels";
  }
  if (p.packed_channels > kMaxChannels || p.packed_channels % kChannelMultiple != 0) {
    return "packed_channels must be a multiple of 16 up to 1024";
  }
  if (!is_element_type(p.content_type) || !is_element_type(p.packed_type)) {
    return "element types must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  }
  if (p.rows < 0) return "rows must not be negative";
  const int whole_vectors = p.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 8;
  if (p.rows_per_tile < whole_vectors || p.rows_per_tile % whole_vectors != 0 || p.rows_per_tile > 256) {
    return "rows_per_tile must be a multiple of 8, of 4 with float32, up to 256";
  }
  if (p.rows_per_tile * p.packed_channels > 8192) return "a tile must have at most 8192 elements";
  if (p.blocks < 1) return "blocks must be positive";
  if (p.rows / p.rows_per_tile >= int64_t{1} << 30) return "rows / rows_per_tile must be below 2^30";
  if (p.rows == 0 || p.content_channels == 0) return nullptr;
  if (p.dpacked == nullptr || p.packed == nullptr || p.dcontent == nullptr || (p.rstd == nullptr && p.normalize != 0)) {
    return "a pointer is null";
  }
  const bool aligned = is_aligned(p.dpacked) && is_aligned(p.packed) && is_aligned(p.dcontent);
  return aligned ? nullptr : "dpacked, packed and dcontent must lie on 16 bytes";
}

const char* broken_rule(const SharedKVForwardParams& p, std::initializer_list<RowTensor> tiled, int columns) {
  if (const char* rule = broken_rows(p, columns, "channels must be at most 512")) return rule;
  if (!is_half_or_float(p.z_out_type, p.type)) return "z_out_type must be 0 (float32) or type";
  if (const char* rule = broken_splits(p, shared_kv_block_kv(columns), shared_kv_block_q(columns))) return rule;
  if (!(p.scale_log2 > 0.0f)) return "scale_log2 must be positive";
  if (p.batch == 0 || p.rows == 0) return nullptr;
  if (p.tokens == 0) return "there must be tokens";
  if (p.q == nullptr || p.x == nullptr || p.z_out == nullptr || p.lse_out == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode_all(tiled)) return "q and x must have a base and pitches of 16 bytes";
  return is_aligned(p.z_out) ? nullptr : "z_out must lie on 16 bytes";
}

const char* broken_rule(const SharedKVBackwardParams& p, std::initializer_list<RowTensor> tiled, int columns) {
  if (const char* rule = broken_rows(p, columns, "channels must be at most 336")) return rule;
  if (!is_half_or_float(p.dq_out_type, p.type)) return "dq_out_type must be 0 (float32) or type";
  if (const char* rule = broken_splits(p, shared_kv_dq_block_kv(columns), shared_kv_block_q(columns))) return rule;
  const int64_t token_blocks = (int64_t{p.tokens} + kSharedKVGradientBlockKV - 1) / kSharedKVGradientBlockKV;
  if (token_blocks * p.batch > kMostBlocks / 2) return "there must be fewer than 2^30 blocks of tokens";
  if (!(p.scale > 0.0f) || !(p.scale_log2 > 0.0f)) return "scale and scale_log2 must be positive";
  if (p.batch == 0 || p.rows == 0 || p.tokens == 0) return nullptr;
  if (p.dx != nullptr && p.blocks < 1) return "blocks must be positive";
  if (p.q == nullptr || p.dz == nullptr || p.x == nullptr || p.lse == nullptr || p.delta == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode_all(tiled)) return "q, dz and x must have a base and pitches of 16 bytes";
  return is_aligned(p.dq_out) && is_aligned(p.dx) ? nullptr : "gradients must lie on 16 bytes";
}

const char* broken_rule(const AttentionForwardParams& p, std::initializer_list<RowTensor> tiled, int columns) {
  if (const char* rule = broken_size(p, columns, "channels must be at most 256")) return rule;
  if (p.out_type != p.type && p.out_type != static_cast<int32_t>(ElementType::kFloat32)) {
    return "out_type must be 0 (float32) or type";
  }
  if (p.block_kv != attention_block_kv(columns) && (columns != 64 || p.block_kv != kAttentionLongBlockKV)) {
    return "block_kv must be the keys of a tile of a kernel";
  }
  if (p.splits < 1 || p.keys_per_split < 1 || (p.splits > 1 && p.keys_per_split % p.block_kv != 0)) {
    return "splits must be positive, and of whole tiles of keys";
  }
  if (int64_t{p.splits} * p.keys_per_split < p.keys) return "the splits must cover the keys";
  const int64_t row_blocks = (int64_t{p.queries} + kAttentionBlockQ - 1) / kAttentionBlockQ;
  if (row_blocks * p.splits * p.heads * p.batch != p.items) return "items must be all blocks of rows of all splits, below 2^31";
  if (!(p.scale_log2 > 0.0f)) return "scale_log2 must be positive";
  if (p.items == 0) return nullptr;
  if (p.blocks < 1) return "blocks must be positive";
  if (p.keys == 0) return "there must be keys";
  if (p.query == nullptr || p.key == nullptr || p.value == nullptr || p.out == nullptr || p.lse_out == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode_all(tiled)) return "query, key and value must have a base and pitches of 16 bytes";
  const bool aligned = rows_aligned(p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  return aligned && p.stride_out_split % 8 == 0 ? nullptr : "out must lie on 16 bytes, its rows too";
}

const char* broken_rule(const AttentionBackwardParams& p, std::initializer_list<RowTensor> tiled, int columns) {
  if (const char* rule = broken_size(p, columns, "channels must be at most 256")) return rule;
  if (const char* rule = columns > 128            ? broken_chunk(p)
                             : p.balanced_tiles > 0 ? broken_balance(p)
                                                    : broken_split(p)) return rule;
  const int block_q = attention_bwd_block_q(columns);
  if (p.query_blocks != (int64_t{p.queries} + block_q - 1) / block_q) return "query_blocks must cover the queries";
  if (int64_t{p.batch} * p.heads * p.query_blocks * 4 >= int64_t{1} << 31) {
    return "there must be fewer than 2^29 blocks of queries";
  }
  if (!(p.scale > 0.0f) || !(p.scale_log2 > 0.0f)) return "scale and scale_log2 must be positive";
  if (p.batch == 0 || p.queries == 0) return nullptr;
  if (p.blocks < 1) return "blocks must be positive";
  if (p.query == nullptr || p.key == nullptr || p.value == nullptr || p.out == nullptr || p.dout == nullptr ||
      p.lse == nullptr || p.rows == nullptr || p.dq == nullptr || p.dk == nullptr || p.dv == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode_all(tiled)) return "query, key, value, dout and gradients must have a base and pitches of 16 bytes";
  const bool aligned = rows_aligned(p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  return aligned && is_aligned(p.rows) && is_aligned(p.dq_parts) ? nullptr : "out and workspaces must lie on 16 bytes";
}

const char* broken_rule(const RowProductsParams& p) {
  if (p.batch < 0 || p.rows < 0 || p.channels < 4 || p.channels % 4 != 0) {
    return "sizes must not be negative, channels a positive multiple of 4";
  }
  if (!is_half(p.type)) return "type must be 1 (float16) or 2 (bfloat16)";
  if (p.batch == 0 || p.rows == 0) return nullptr;
  if (p.dz == nullptr || p.z == nullptr || p.delta == nullptr) return "a pointer is null";
  if (int64_t{p.batch} * p.rows > kMostBlocks) return "there must be fewer than 2^31 rows";
  const bool aligned = rows_aligned(p.dz, p.stride_dz_batch, 0, p.stride_dz_row) && is_aligned(p.z);
  return aligned ? nullptr : "dz and z must lie on 16 bytes, rows of dz too";
}

const char* broken_rule(const MergeStatesParams& p) {
  if (p.batch < 0 || p.splits < 0 || p.rows < 0 || p.channels < 4 || p.channels % 4 != 0) {
    return "sizes must not be negative, channels a positive multiple of 4";
  }
  if (!is_element_type(p.z_type)) return "z_type must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  if (p.batch == 0 || p.rows == 0) return nullptr;
  const bool sums = p.lse == nullptr;
  if (sums && (p.lse_part != nullptr || p.lse_state != nullptr || p.rho != nullptr)) return "sums have no lse and no rho";
  if (!sums && (p.z_state == nullptr) != (p.lse_state == nullptr)) return "an earlier state is z_state and lse_state";
  if (p.heads < 1 || p.batch % p.heads != 0) return "heads must divide batch";
  if (p.z == nullptr || (p.splits > 0 && (p.z_part == nullptr || (!sums && p.lse_part == nullptr)))) {
    return "a pointer is null";
  }
  if (!is_aligned(p.z) || !is_aligned(p.z_part) || !is_aligned(p.z_state)) return "z must lie on 16 bytes everywhere";
  return nullptr;
}

}  // namespace perceiver
