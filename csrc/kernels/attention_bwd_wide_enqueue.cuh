// Starts the kernels of attention's backward of heads of up to 256 channels, chunk by chunk.
#pragma once

#include <algorithm>

#include "kernels/attention_bwd_ends.cuh"
#include "kernels/attention_bwd_products.cuh"

namespace perceiver {

inline WideChunk chunk_of(const AttentionBackwardParams& params, int row, int key) {
  WideChunk chunk;
  chunk.row_begin = row;
  chunk.row_end = static_cast<int>(std::min<int64_t>(int64_t{row} + params.chunk_rows, params.queries));
  chunk.row_blocks = ceil_div(chunk.row_end - row, WideShape::kBlockQ);
  chunk.key_begin = key;
  chunk.key_end = static_cast<int>(std::min<int64_t>(int64_t{key} + params.chunk_keys, params.keys));
  chunk.key_tiles = ceil_div(chunk.key_end - key, WideShape::kBlockKV);
  // The last chunk, which may be shorter, has fewer splits and slices.
  const int tiles_per_split = ceil_div(chunk.key_tiles, params.splits);
  chunk.keys_per_split = tiles_per_split * WideShape::kBlockKV;
  chunk.splits = ceil_div(chunk.key_tiles, tiles_per_split);
  const int strips = chunk.row_blocks * kConsumers;
  chunk.strips_per_slice = ceil_div(strips, params.slices);
  chunk.slices = ceil_div(strips, chunk.strips_per_slice);
  chunk.items = chunk.row_blocks * chunk.splits * params.heads * params.batch;
  chunk.product_items =
      ceil_div(chunk.key_tiles, kConsumers) * 2 * chunk.slices * (params.heads / params.heads_per_key_head) * params.batch;
  chunk.ds_bytes = int64_t{params.batch} * params.heads * strips * chunk.key_tiles * WideShape::kTileBytes;
  chunk.continues_rows = key > 0;
  chunk.continues_keys = row > 0;
  return chunk;
}

struct WideRowsShape {
  static constexpr int kColumns = WideShape::kColumns, kBlockQ = kRowsBlock;
};

template <ElementType kElement>
cudaError_t enqueue_attention_bwd_wide(const AttentionBackwardMaps& maps, const AttentionBackwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const auto of_rows = &attention_bwd_wide_kernel<Element>;
  const auto of_keys = &attention_bwd_products_kernel<Element>;
  cudaError_t error = cudaFuncSetAttribute(of_rows, cudaFuncAttributeMaxDynamicSharedMemorySize, WideShape::kSharedBytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(of_keys, cudaFuncAttributeMaxDynamicSharedMemorySize, WideProductShape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const auto query_blocks = static_cast<unsigned>(params.batch) * params.heads * params.query_blocks;
  attention_bwd_rows_kernel<Element, WideRowsShape><<<query_blocks, kRowThreads, 0, stream>>>(params);
  for (int64_t row = 0; row < params.queries; row += params.chunk_rows) {
    for (int64_t key = 0; key < params.keys; key += params.chunk_keys) {
      const WideChunk chunk = chunk_of(params, static_cast<int>(row), static_cast<int>(key));
      of_rows<<<std::min(chunk.items, params.blocks), kBlockThreads, WideShape::kSharedBytes, stream>>>(maps, params, chunk);
      of_keys<<<std::min(chunk.product_items, params.blocks), kBlockThreads, WideProductShape::kSharedBytes, stream>>>(
          maps, params, chunk);
    }
  }
  if (params.splits > 1 || params.chunk_keys < params.keys) {
    sum_parts<Element, WideShape::kColumns>(params, params.dq_parts, params.splits,
                                            int64_t{params.splits} * params.queries * WideShape::kColumns, params.heads,
                                            params.queries, params.channels_qk, params.dq, params.stride_dq_batch,
                                            params.stride_dq_head, params.stride_dq_row, params.scale);
  }
  if (params.key_parts != nullptr) sum_slices<Element, WideShape::kColumns>(params);
  return cudaGetLastError();
}

}  // namespace perceiver
