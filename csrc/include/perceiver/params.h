// Parameters of every kernel as plain structs: pointers, strides in elements, sizes, and Python's plan.
#pragma once

#include <cstdint>

namespace perceiver {

enum class ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int32_t kMaxChannels = 1024;
constexpr int32_t kChannelMultiple = 16;

// packed[b, m, :] = concatenation of content[b, m, :] and positions[b, m, :], normalised, zero padded, cast.
struct PackForwardParams {
  // [batch, tokens, content_channels]; may be null when content_channels is 0.
  const void* content;
  int64_t stride_content_batch;
  int64_t stride_content_token;
  int64_t stride_content_channel;
  // [batch, tokens, position_channels], batch stride 0 when shared; null when position_channels is 0.
  const void* positions;
  int64_t stride_positions_batch;
  int64_t stride_positions_token;
  int64_t stride_positions_channel;
  // [batch, tokens] bytes, nonzero = visible; null: every token is visible.
  const void* key_mask;
  int64_t stride_key_mask_batch;
  int64_t stride_key_mask_token;
  // [batch, tokens, packed_channels], contiguous, 16-byte aligned.
  void* packed;
  // [batch, tokens] float, contiguous; null when normalize is 0.
  void* rstd;
  int64_t batch;
  int64_t tokens;
  int32_t content_channels;
  int32_t position_channels;
  int32_t packed_channels;
  int32_t content_type;
  int32_t positions_type;
  int32_t packed_type;
  int32_t normalize;
  float eps;
  // The plan. flat: no positions, batch 1, and content is one run that starts on 16 bytes.
  int32_t flat;
  int32_t rows_per_tile;
  int32_t blocks;
  int32_t device;
  void* stream;
};

// dcontent[row, :] = rstd (dy - mean(dy) - x_hat mean(dy x_hat)) over the channels, or dy where nothing was normalised.
struct PackBackwardParams {
  // [rows, packed_channels], contiguous, on 16 bytes: the gradient of what was packed, dy, and what was packed, x_hat.
  const void* dpacked;
  const void* packed;
  // [rows] float; of masked tokens 0. null when normalize is 0.
  const float* rstd;
  // [rows, content_channels], contiguous, on 16 bytes.
  void* dcontent;
  int64_t rows;
  int32_t content_channels;
  // Content and positions, over which the means are taken.
  int32_t channels;
  int32_t packed_channels;
  int32_t packed_type;
  int32_t content_type;
  int32_t normalize;
  // The plan: a multiple of 8, or of 4 for float32, so that every tile of dcontent starts on 16 bytes; and the grid.
  int32_t rows_per_tile;
  int32_t blocks;
  int32_t device;
  void* stream;
};

// The softmax states (z, lse) of one shared-KV attention: of every split of the tokens, or the result where there is one split.
struct SharedKVForwardParams {
  // [batch, rows, channels], any batch and row pitch of a multiple of 16 bytes, on 16 bytes.
  const void* q;
  int64_t stride_q_batch;
  int64_t stride_q_row;
  // [batch, tokens, channels], as q.
  const void* x;
  int64_t stride_x_batch;
  int64_t stride_x_token;
  // [batch, tokens] bytes, contiguous, nonzero = visible; null: every token is visible.
  const void* key_mask;
  // [batch]; null: every token counts.
  const int32_t* lengths;
  // [batch, splits, rows, channels], contiguous; float, or q's type.
  void* z_out;
  // [batch, splits, rows] float; rho_out may be null.
  float* lse_out;
  float* rho_out;
  int32_t batch;
  int32_t rows;
  int32_t tokens;
  int32_t channels;
  int32_t type;
  int32_t z_out_type;
  // The plan: a multiple of the kernel's tile of tokens but for the last split.
  int32_t splits;
  int32_t tokens_per_split;
  float scale_log2;
  int32_t device;
  void* stream;
};

// The gradients of shared-KV attention: dq of every split of the tokens, dx, each where it is not null.
struct SharedKVBackwardParams {
  // As in SharedKVForwardParams.
  const void* q;
  int64_t stride_q_batch;
  int64_t stride_q_row;
  // [batch, rows, channels], as q.
  const void* dz;
  int64_t stride_dz_batch;
  int64_t stride_dz_row;
  const void* x;
  int64_t stride_x_batch;
  int64_t stride_x_token;
  // [batch, rows] float, contiguous; delta is dz . z - dlse.
  const float* lse;
  const float* delta;
  // As in SharedKVForwardParams; tokens that are masked are zeros.
  const void* key_mask;
  const int32_t* lengths;
  // [batch, splits, rows, channels], contiguous; float, or q's type.
  void* dq_out;
  // [batch, tokens, channels], contiguous.
  void* dx;
  int32_t batch;
  int32_t rows;
  int32_t tokens;
  int32_t channels;
  int32_t type;
  int32_t dq_out_type;
  // The plan: splits and their tokens are of dq, blocks those of dx that run at a time.
  int32_t splits;
  int32_t tokens_per_split;
  int32_t blocks;
  float scale;
  float scale_log2;
  // scale, or less than 0 where q was negated for a scale above 0, or 0.
  float dq_scale;
  int32_t device;
  void* stream;
};

// The softmax states (out, lse) of attention over given keys and values, of every split of the keys.
struct AttentionForwardParams {
  // [batch, heads, queries, channels_qk], on 16 bytes, any pitches of a multiple of 16 bytes.
  const void* query;
  int64_t stride_query_batch;
  int64_t stride_query_head;
  int64_t stride_query_row;
  // [batch, heads / heads_per_key_head, keys, channels], as query; value of its own channels.
  const void* key;
  int64_t stride_key_batch;
  int64_t stride_key_head;
  int64_t stride_key_row;
  const void* value;
  int64_t stride_value_batch;
  int64_t stride_value_head;
  int64_t stride_value_row;
  // [batch, heads, splits, queries, channels_v], channels side by side, rows on 16 bytes; float, or query's type.
  void* out;
  int64_t stride_out_batch;
  int64_t stride_out_head;
  int64_t stride_out_split;
  int64_t stride_out_row;
  // [batch, heads, splits, queries], contiguous.
  float* lse_out;
  int32_t batch;
  int32_t heads;
  int32_t heads_per_key_head;
  int32_t queries;
  int32_t keys;
  int32_t channels_qk;
  int32_t channels_v;
  int32_t type;
  int32_t out_type;
  // The plan: the keys of a tile, of which a split is a multiple but for the last one; items are all blocks of rows of all
  // splits, blocks what runs at a time.
  int32_t block_kv;
  int32_t splits;
  int32_t keys_per_split;
  int32_t items;
  int32_t blocks;
  float scale_log2;
  int32_t device;
  void* stream;
};

// The gradients of attention over given keys and values.
struct AttentionBackwardParams {
  // As in AttentionForwardParams.
  const void* query;
  int64_t stride_query_batch;
  int64_t stride_query_head;
  int64_t stride_query_row;
  const void* key;
  int64_t stride_key_batch;
  int64_t stride_key_head;
  int64_t stride_key_row;
  const void* value;
  int64_t stride_value_batch;
  int64_t stride_value_head;
  int64_t stride_value_row;
  // [batch, heads, queries, channels_v], as query.
  const void* out;
  int64_t stride_out_batch;
  int64_t stride_out_head;
  int64_t stride_out_row;
  const void* dout;
  int64_t stride_dout_batch;
  int64_t stride_dout_head;
  int64_t stride_dout_row;
  // [batch, heads, queries] float, contiguous; dlse may be null.
  const float* lse;
  const float* dlse;
  // [batch, heads, query_blocks, 2, rows of a block]: a workspace, lse in powers of two and delta.
  float* rows;
  // A workspace. Up to 128 channels [splits, batch, heads, query_blocks, rows of a block, columns of the kernel], in the order
  // of its registers, or with slices [blocks, query_blocks of a slice, ...], null for one tile of keys; of 256
  // [batch, heads, splits, queries, 256], null for one chunk and split.
  float* dq_parts;
  // Of the kernels for 256 channels, null otherwise: p and ds of a chunk, in tiles.
  void* tiles;
  // [batch, key heads, 2 (dv, dk), slices, keys, columns of the kernel]; null for one slice, of 256 channels and one chunk.
  float* key_parts;
  // The gradients, as query, key and value.
  void* dq;
  int64_t stride_dq_batch;
  int64_t stride_dq_head;
  int64_t stride_dq_row;
  void* dk;
  int64_t stride_dk_batch;
  int64_t stride_dk_head;
  int64_t stride_dk_row;
  void* dv;
  int64_t stride_dv_batch;
  int64_t stride_dv_head;
  int64_t stride_dv_row;
  int32_t batch;
  int32_t heads;
  int32_t heads_per_key_head;
  int32_t queries;
  int32_t keys;
  int32_t channels_qk;
  int32_t channels_v;
  int32_t type;
  // The plan: query_blocks cover the queries; keys_per_split is a multiple of the kernel's tile of keys but for the last split;
  // items are all splits of all heads of keys, blocks what runs at a time.
  int32_t query_blocks;
  int32_t splits;
  int32_t keys_per_split;
  int32_t chunk_rows;
  int32_t chunk_keys;
  int32_t slices;
  // Tiles of keys of a head, and of all heads, where blocks have as many tiles each, of two heads where they must, and splits are
  // the most blocks that have a head's; 0 where splits are alike.
  int32_t balanced_tiles;
  int32_t all_tiles;
  int32_t items;
  int32_t blocks;
  float scale;
  float scale_log2;
  int32_t device;
  void* stream;
};

// (z, lse, rho) of the states of all splits, and of an earlier one where there is one; where lse is null, z is the sum of all
// z_part and z_state.
struct MergeStatesParams {
  // [batch, splits, rows, channels] and [batch, splits, rows] float, contiguous.
  const float* z_part;
  const float* lse_part;
  // [batch, rows, channels] and [batch, rows] float, contiguous; null: none.
  const float* z_state;
  const float* lse_state;
  // [batch / heads, heads, rows, channels], channels side by side, rows on 16 bytes.
  void* z;
  int64_t stride_z_batch;
  int64_t stride_z_head;
  int64_t stride_z_row;
  // [batch, rows]; rho may be null.
  float* lse;
  float* rho;
  int32_t heads;
  int32_t batch;
  int32_t splits;
  int32_t rows;
  int32_t channels;
  int32_t z_type;
  int32_t device;
  void* stream;
};

// delta = dz . z - dlse of every row.
struct RowProductsParams {
  // [batch, rows, channels], 16-bit, rows on 8 bytes.
  const void* dz;
  int64_t stride_dz_batch;
  int64_t stride_dz_row;
  // [batch, rows, channels] and [batch, rows], contiguous; dlse may be null.
  const float* z;
  const float* dlse;
  float* delta;
  int32_t batch;
  int32_t rows;
  int32_t channels;
  int32_t type;
  int32_t device;
  void* stream;
};

}  // namespace perceiver
