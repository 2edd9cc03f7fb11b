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

// Neighbouring blocks of rows that bring in tokens together, each a share for all (a cluster): 1, of the widest rows 1 or 2.
constexpr int kSharedKVWideCluster = 1;
constexpr int shared_kv_cluster(int columns) { return columns <= 336 ? 1 : kSharedKVWideCluster; }

// Blocks of rows: whole clusters, of which the last may have blocks without rows.
constexpr int64_t shared_kv_row_blocks(int64_t rows, int columns) {
  const int64_t in_cluster = int64_t{shared_kv_block_q(columns)} * shared_kv_cluster(columns);
  return (rows + in_cluster - 1) / in_cluster * shared_kv_cluster(columns);
}

// The kernel for rows of up to kColumns channels of one element type, of tiles of shared_kv_block_kv(kColumns) tokens.
template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_fwd(const SharedKVMaps& maps, const SharedKVForwardParams& params);

// Shared memory of a block of the kernel for `columns`; 0: there is none.
int shared_kv_shared_bytes(int columns);

// Merges the softmax states of all splits, and that of earlier tokens.
cudaError_t enqueue_merge_states(const MergeStatesParams& params);

}  // namespace perceiver
