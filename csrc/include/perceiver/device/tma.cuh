// Tiles of a tensor brought into shared memory by the copy engine (TMA, sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace perceiver {

// The tile at (column, row, head, entry) of a map; elements past the ends arrive as zeros. Its bytes count on `barrier`.
__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int column, int row, int head,
                                          int entry) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(
          tile),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(entry)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace perceiver
