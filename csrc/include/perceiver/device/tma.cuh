// Tiles of a tensor brought into shared memory, or out of it, by the copy engine (TMA, sm_90).
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

// A policy for what is read or written once: the L2 gives it up first.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void load_tile(uint32_t tile, const CUtensorMap& map, uint32_t barrier, int column, int row, int head,
                                          int entry, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(tile),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(entry), "l"(policy)
      : "memory");
}

// Where `stores` holds, writes a tile as one group. Without a branch, which would serialize products that are running.
__device__ __forceinline__ void store_tile_if(bool stores, const CUtensorMap& map, uint32_t tile, int column, int row, int head,
                                              int entry) {
  asm volatile(
      "{\n.reg .pred stores;\nsetp.ne.b32 stores, %6, 0;\n"
      "@stores cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "@stores cp.async.bulk.commit_group;\n}" ::"l"(&map),
      "r"(tile), "r"(column), "r"(row), "r"(head), "r"(entry), "r"(static_cast<int>(stores))
      : "memory");
}

// Writes a tile; elements past the ends are left out. The thread's stores since the last commit are one group.
__device__ __forceinline__ void store_tile(const CUtensorMap& map, uint32_t tile, int column, int row, int head, int entry,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(&map),
      "r"(tile), "r"(column), "r"(row), "r"(head), "r"(entry), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits for this thread's stores. Without a branch, which would serialize products that are running.
__device__ __forceinline__ void wait_stores_if(bool waits) {
  asm volatile("{\n.reg .pred waits;\nsetp.ne.b32 waits, %0, 0;\n@waits cp.async.bulk.wait_group 0;\n}" ::"r"(
                   static_cast<int>(waits))
               : "memory");
}

// Where `stores` holds, one group: floats in device memory become those of a run of shared memory, or these are added to them.
// Without a branch. Runs that are added to the same floats are added in order where the thread waits for each before the next.
__device__ __forceinline__ void store_or_add_run_if(bool stores, float* gSums, uint32_t run, int bytes, bool begins) {
  asm volatile(
      "{\n.reg .pred stores, begins, adds;\nsetp.ne.b32 stores, %3, 0;\n"
      "setp.ne.and.b32 begins, %4, 0, stores;\nsetp.eq.and.b32 adds, %4, 0, stores;\n"
      "@begins cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
      "@adds cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "@stores cp.async.bulk.commit_group;\n}" ::"l"(gSums),
      "r"(run), "r"(bytes), "r"(static_cast<int>(stores)), "r"(static_cast<int>(begins))
      : "memory");
}

// `bytes` bytes, a multiple of 16 on 16 bytes, which count on `barrier`.
__device__ __forceinline__ void load_run(uint32_t run, const void* gSource, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(run), "l"(gSource),
               "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace perceiver
