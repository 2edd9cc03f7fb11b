// Parameters of every kernel as plain structs: pointers, strides in elements, sizes, and Python's plan.
// Each struct has one list of its fields: the binding's properties and both sides' layouts are made from it.
#pragma once

#include <cstddef>
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
  // The plan. flat: no positions, and content[b] is one run that starts on 16 bytes.
  int32_t flat;
  int32_t rows_per_tile;
  int32_t blocks;
  int32_t device;
  void* stream;
};

template <typename Visit>
void visit_fields(const PackForwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &PackForwardParams::name, offsetof(PackForwardParams, name))
  PK_FIELD(content);
  PK_FIELD(stride_content_batch);
  PK_FIELD(stride_content_token);
  PK_FIELD(stride_content_channel);
  PK_FIELD(positions);
  PK_FIELD(stride_positions_batch);
  PK_FIELD(stride_positions_token);
  PK_FIELD(stride_positions_channel);
  PK_FIELD(key_mask);
  PK_FIELD(stride_key_mask_batch);
  PK_FIELD(stride_key_mask_token);
  PK_FIELD(packed);
  PK_FIELD(rstd);
  PK_FIELD(batch);
  PK_FIELD(tokens);
  PK_FIELD(content_channels);
  PK_FIELD(position_channels);
  PK_FIELD(packed_channels);
  PK_FIELD(content_type);
  PK_FIELD(positions_type);
  PK_FIELD(packed_type);
  PK_FIELD(normalize);
  PK_FIELD(eps);
  PK_FIELD(flat);
  PK_FIELD(rows_per_tile);
  PK_FIELD(blocks);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

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
  // The plan: a multiple of the kernel's tile of keys but for the last split; items are all blocks of rows of all splits,
  // blocks what runs at a time.
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
  // [splits, batch, heads, query_blocks, rows of a block, columns of the kernel]: a workspace, in the order of its registers.
  float* dq_parts;
  // Of the kernels for 256 channels, null otherwise: p and ds of a chunk, in tiles, and the parts of dk and dv,
  // [batch, key heads, 2, slices, keys in whole tiles, 256], null for one slice.
  void* tiles;
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
  int32_t items;
  int32_t blocks;
  float scale;
  float scale_log2;
  int32_t device;
  void* stream;
};

// (z, lse, rho) of the states of all splits, and of an earlier one where there is one.
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

template <typename Visit>
void visit_fields(const SharedKVForwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &SharedKVForwardParams::name, offsetof(SharedKVForwardParams, name))
  PK_FIELD(q);
  PK_FIELD(stride_q_batch);
  PK_FIELD(stride_q_row);
  PK_FIELD(x);
  PK_FIELD(stride_x_batch);
  PK_FIELD(stride_x_token);
  PK_FIELD(key_mask);
  PK_FIELD(lengths);
  PK_FIELD(z_out);
  PK_FIELD(lse_out);
  PK_FIELD(rho_out);
  PK_FIELD(batch);
  PK_FIELD(rows);
  PK_FIELD(tokens);
  PK_FIELD(channels);
  PK_FIELD(type);
  PK_FIELD(z_out_type);
  PK_FIELD(splits);
  PK_FIELD(tokens_per_split);
  PK_FIELD(scale_log2);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

// Of a [batch, heads, rows, channels] tensor.
#define PK_STRIDES(name)           \
  PK_FIELD(stride_##name##_batch); \
  PK_FIELD(stride_##name##_head);  \
  PK_FIELD(stride_##name##_row)

template <typename Visit>
void visit_fields(const AttentionForwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &AttentionForwardParams::name, offsetof(AttentionForwardParams, name))
  PK_FIELD(query);
  PK_STRIDES(query);
  PK_FIELD(key);
  PK_STRIDES(key);
  PK_FIELD(value);
  PK_STRIDES(value);
  PK_FIELD(out);
  PK_FIELD(stride_out_batch);
  PK_FIELD(stride_out_head);
  PK_FIELD(stride_out_split);
  PK_FIELD(stride_out_row);
  PK_FIELD(lse_out);
  PK_FIELD(batch);
  PK_FIELD(heads);
  PK_FIELD(heads_per_key_head);
  PK_FIELD(queries);
  PK_FIELD(keys);
  PK_FIELD(channels_qk);
  PK_FIELD(channels_v);
  PK_FIELD(type);
  PK_FIELD(out_type);
  PK_FIELD(splits);
  PK_FIELD(keys_per_split);
  PK_FIELD(items);
  PK_FIELD(blocks);
  PK_FIELD(scale_log2);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

template <typename Visit>
void visit_fields(const AttentionBackwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &AttentionBackwardParams::name, offsetof(AttentionBackwardParams, name))
  PK_FIELD(query);
  PK_STRIDES(query);
  PK_FIELD(key);
  PK_STRIDES(key);
  PK_FIELD(value);
  PK_STRIDES(value);
  PK_FIELD(out);
  PK_STRIDES(out);
  PK_FIELD(dout);
  PK_STRIDES(dout);
  PK_FIELD(lse);
  PK_FIELD(dlse);
  PK_FIELD(rows);
  PK_FIELD(dq_parts);
  PK_FIELD(tiles);
  PK_FIELD(key_parts);
  PK_FIELD(dq);
  PK_STRIDES(dq);
  PK_FIELD(dk);
  PK_STRIDES(dk);
  PK_FIELD(dv);
  PK_STRIDES(dv);
  PK_FIELD(batch);
  PK_FIELD(heads);
  PK_FIELD(heads_per_key_head);
  PK_FIELD(queries);
  PK_FIELD(keys);
  PK_FIELD(channels_qk);
  PK_FIELD(channels_v);
  PK_FIELD(type);
  PK_FIELD(query_blocks);
  PK_FIELD(splits);
  PK_FIELD(keys_per_split);
  PK_FIELD(chunk_rows);
  PK_FIELD(chunk_keys);
  PK_FIELD(slices);
  PK_FIELD(items);
  PK_FIELD(blocks);
  PK_FIELD(scale);
  PK_FIELD(scale_log2);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

#undef PK_STRIDES

template <typename Visit>
void visit_fields(const MergeStatesParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &MergeStatesParams::name, offsetof(MergeStatesParams, name))
  PK_FIELD(z_part);
  PK_FIELD(lse_part);
  PK_FIELD(z_state);
  PK_FIELD(lse_state);
  PK_FIELD(z);
  PK_FIELD(stride_z_batch);
  PK_FIELD(stride_z_head);
  PK_FIELD(stride_z_row);
  PK_FIELD(lse);
  PK_FIELD(rho);
  PK_FIELD(heads);
  PK_FIELD(batch);
  PK_FIELD(splits);
  PK_FIELD(rows);
  PK_FIELD(channels);
  PK_FIELD(z_type);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

}  // namespace perceiver
