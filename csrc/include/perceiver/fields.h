// The fields of every struct of params.h, one list each: the binding's properties and both sides' layouts are made from it.
#pragma once

#include <cstddef>

#include "perceiver/params.h"

namespace perceiver {

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

template <typename Visit>
void visit_fields(const PackBackwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &PackBackwardParams::name, offsetof(PackBackwardParams, name))
  PK_FIELD(dpacked);
  PK_FIELD(packed);
  PK_FIELD(rstd);
  PK_FIELD(dcontent);
  PK_FIELD(rows);
  PK_FIELD(content_channels);
  PK_FIELD(channels);
  PK_FIELD(packed_channels);
  PK_FIELD(packed_type);
  PK_FIELD(content_type);
  PK_FIELD(normalize);
  PK_FIELD(rows_per_tile);
  PK_FIELD(blocks);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

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

template <typename Visit>
void visit_fields(const SharedKVBackwardParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &SharedKVBackwardParams::name, offsetof(SharedKVBackwardParams, name))
  PK_FIELD(q);
  PK_FIELD(stride_q_batch);
  PK_FIELD(stride_q_row);
  PK_FIELD(dz);
  PK_FIELD(stride_dz_batch);
  PK_FIELD(stride_dz_row);
  PK_FIELD(x);
  PK_FIELD(stride_x_batch);
  PK_FIELD(stride_x_token);
  PK_FIELD(lse);
  PK_FIELD(delta);
  PK_FIELD(key_mask);
  PK_FIELD(lengths);
  PK_FIELD(dq_out);
  PK_FIELD(dx);
  PK_FIELD(batch);
  PK_FIELD(rows);
  PK_FIELD(tokens);
  PK_FIELD(channels);
  PK_FIELD(type);
  PK_FIELD(dq_out_type);
  PK_FIELD(splits);
  PK_FIELD(tokens_per_split);
  PK_FIELD(blocks);
  PK_FIELD(scale);
  PK_FIELD(scale_log2);
  PK_FIELD(dq_scale);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

template <typename Visit>
void visit_fields(const RowProductsParams*, Visit&& visit) {
#define PK_FIELD(name) visit(#name, &RowProductsParams::name, offsetof(RowProductsParams, name))
  PK_FIELD(dz);
  PK_FIELD(stride_dz_batch);
  PK_FIELD(stride_dz_row);
  PK_FIELD(z);
  PK_FIELD(dlse);
  PK_FIELD(delta);
  PK_FIELD(batch);
  PK_FIELD(rows);
  PK_FIELD(channels);
  PK_FIELD(type);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

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
  PK_FIELD(block_kv);
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
  PK_FIELD(balanced_tiles);
  PK_FIELD(all_tiles);
  PK_FIELD(items);
  PK_FIELD(blocks);
  PK_FIELD(scale);
  PK_FIELD(scale_log2);
  PK_FIELD(device);
  PK_FIELD(stream);
#undef PK_FIELD
}

#undef PK_STRIDES

}  // namespace perceiver
