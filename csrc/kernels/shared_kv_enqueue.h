// What the instantiations of the shared-KV kernels define and launch.cpp calls; free of device code.
#pragma once

#include <cuda.h>
#include <driver_types.h>

#include "perceiver/params.h"

namespace perceiver {

// Tiles of 64 columns of queries and tokens, and of the 16 columns that are left of queries of 16 modulo 64.
struct SharedKVMaps {
  CUtensorMap query;
  CUtensorMap query_tail;
  CUtensorMap tokens;
};

// The widths that there are kernels for: rows take the first that holds them.
constexpr int kSharedKVColumns[] = {64, 128, 256, 272, 336, 512};

// Tokens of a tile.
constexpr int shared_kv_block_kv(int columns) {
  return columns <= 128 ? 128 : columns <= 272 ? 80 : columns <= 336 ? 48 : 64;
}

// Query rows of a block.
constexpr int shared_kv_block_q(int columns) { return columns <= 336 ? 128 : 64; }

// The kernel for rows of up to kColumns channels of one element type, of tiles of shared_kv_block_kv(kColumns) tokens.
template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_fwd(const SharedKVMaps& maps, const SharedKVForwardParams& params);

// Of the gradients: the same of the queries and of dz, and of tokens.
struct SharedKVBackwardMaps {
  CUtensorMap query;
  CUtensorMap query_tail;
  CUtensorMap dz;
  CUtensorMap dz_tail;
  CUtensorMap tokens;
  CUtensorMap tokens_tail;
};

// The widths that there are kernels of gradients for.
constexpr int kSharedKVGradientColumns[] = {64, 128, 256, 272, 336};

// Tokens of a tile of the gradient of the queries.
constexpr int shared_kv_dq_block_kv(int columns) {
  return columns <= 64 ? 128 : columns <= 128 ? 96 : columns <= 272 ? 64 : 32;
}

// Query rows of a tile of the gradient of the tokens, and its tokens.
constexpr int shared_kv_dx_block_q(int columns) { return columns <= 128 ? 128 : columns <= 272 ? 64 : 32; }
constexpr int kSharedKVGradientBlockKV = 128;

// The gradient of the queries, of every split of the tokens; that of the tokens.
template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_bwd_dq(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params);
template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_bwd_dx(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params);

// Shared memory of a block of the kernel for `columns`; 0: there is none.
int shared_kv_shared_bytes(int columns);
int shared_kv_bwd_dq_shared_bytes(int columns);
int shared_kv_bwd_dx_shared_bytes(int columns);

// delta of every row.
cudaError_t enqueue_row_products(const RowProductsParams& params);

// Merges the softmax states of all splits, and that of earlier tokens.
cudaError_t enqueue_merge_states(const MergeStatesParams& params);

}  // namespace perceiver
