// The gradients of keys and values from weights and their gradients: the second kernel of attention's backward for heads of up
// to 256 channels.
#pragma once

#include "kernels/attention_bwd_wide.cuh"

namespace perceiver {

// out [128 keys, 256 columns] (+)= tiles^T rows over the rows of a chunk: dv of p and dout, dk of ds and queries.
//
// Work: items of (128 keys, gradient, slice of the rows, head of keys, batch entry). A stage is 64 rows: two tiles of 8 KiB,
// and 32 KiB of rows.
struct WideProductShape {
  static constexpr int kStages = 4, kStageBytes = kConsumers * WideShape::kTileBytes + WideShape::kRowBytes;
  static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStages * 8;
};

template <class Element>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_bwd_products_kernel(const __grid_constant__ AttentionBackwardMaps maps,
                                  const __grid_constant__ AttentionBackwardParams params,
                                  const __grid_constant__ WideChunk chunk) {
  extern __shared__ unsigned char shared[];
  const uint32_t base = (shared_address(shared) + 1023) & ~1023u;
  const auto stage_of = [&](int stage) { return base + stage * WideProductShape::kStageBytes; };
  const auto full = [&](int stage) { return stage_of(WideProductShape::kStages) + 8 * stage; };
  const auto empty = [&](int stage) { return full(WideProductShape::kStages + stage); };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < WideProductShape::kStages; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), kConsumers * kWarpgroup / 32);
    }
    publish_barriers();
  }
  __syncthreads();
  const int key_blocks = (chunk.key_tiles + kConsumers - 1) / kConsumers, key_heads = params.heads / params.heads_per_key_head;
  const int strips = chunk.row_blocks * kConsumers;
  // Of an item: its first tile of keys, gradient (0: dv, 1: dk), slice, head of keys, entry.
  const auto unpack = [&](int item, int (&place)[5]) {
    place[0] = item % key_blocks * kConsumers;
    item /= key_blocks;
    place[1] = item % 2;
    item /= 2;
    place[2] = item % chunk.slices;
    item /= chunk.slices;
    place[3] = item % key_heads;
    place[4] = item / key_heads;
  };
  Turn<WideProductShape::kStages> turn;
  if (threadIdx.x < kWarpgroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    for (int item = blockIdx.x; item < chunk.product_items; item += gridDim.x) {
      int place[5];
      unpack(item, place);
      const int first = place[2] * chunk.strips_per_slice, end = min(first + chunk.strips_per_slice, strips);
      for (int head = place[3] * params.heads_per_key_head; head < (place[3] + 1) * params.heads_per_key_head; ++head) {
        const int64_t flat_head = int64_t{place[4]} * params.heads + head;
        for (int strip = first; strip < end; ++strip, turn.next()) {
          wait(empty(turn.stage), turn.parity ^ 1);
          const int tiles = min(kConsumers, chunk.key_tiles - place[0]);
          arrive_expecting(full(turn.stage), tiles * WideShape::kTileBytes + WideShape::kRowBytes);
          const unsigned char* gTiles = static_cast<const unsigned char*>(params.tiles) + place[1] * chunk.ds_bytes +
                                        ((flat_head * strips + strip) * chunk.key_tiles + place[0]) * WideShape::kTileBytes;
          load_run(stage_of(turn.stage), gTiles, tiles * WideShape::kTileBytes, full(turn.stage));
          load_rows(stage_of(turn.stage) + kConsumers * WideShape::kTileBytes, place[1] == 0 ? maps.dout : maps.query,
                    full(turn.stage), chunk.row_begin + 64 * strip, head, place[4]);
        }
      }
    }
    return;
  }
  take_registers<kConsumerRegisters>();
  const int warpgroup = of_warp(threadIdx.x / kWarpgroup) - 1, thread = threadIdx.x % kWarpgroup;
  for (int item = blockIdx.x; item < chunk.product_items; item += gridDim.x) {
    int place[5];
    unpack(item, place);
    const int first = place[2] * chunk.strips_per_slice, end = min(first + chunk.strips_per_slice, strips);
    const int steps = params.heads_per_key_head * (end - first);
    const int key = chunk.key_begin + (place[0] + warpgroup) * 64 + thread / 32 * 16 + thread % 32 / 4;
    const bool exists[2] = {key < chunk.key_end, key + 8 < chunk.key_end};
    const int64_t part = ((int64_t{place[4]} * key_heads + place[3]) * 2 + place[1]) * params.slices + place[2];
    float* gPart = params.key_parts + (part * params.keys + key) * WideShape::kColumns;
    float sums[WideShape::kColumns / 2];
    int before = 0;
    for (int step = 0; step < steps; ++step, turn.next()) {
      wait(full(turn.stage), turn.parity);
      const OperandTile<16, 1024, Swizzle::k128Bytes> a(stage_of(turn.stage) + warpgroup * WideShape::kTileBytes);
      const OperandTile<WideShape::kRowSlabBytes, 1024, Swizzle::k128Bytes> b(stage_of(turn.stage) +
                                                                              kConsumers * WideShape::kTileBytes);
      fence_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Product<Element, WideShape::kColumns>::template add<true, true>(sums, a.at(2048 * k), b.at(2048 * k),
                                                                           step + k > 0);
      }
      commit_products();
      // The step before is done with its stage.
      wait_products<1>();
      arrive_if(threadIdx.x % 32 == 0 && step > 0, empty(before));
      before = turn.stage;
    }
    wait_products<0>();
    pin(sums);
    arrive_if(threadIdx.x % 32 == 0, empty(before));
    const float factor = place[1] == 0 ? 1.0f : params.scale, factors[2] = {factor, factor};
    if (params.key_parts == nullptr) {
      Element* gOut = place[1] == 0 ? static_cast<Element*>(params.dv) + place[4] * params.stride_dv_batch +
                                          place[3] * params.stride_dv_head + key * params.stride_dv_row
                                    : static_cast<Element*>(params.dk) + place[4] * params.stride_dk_batch +
                                          place[3] * params.stride_dk_head + key * params.stride_dk_row;
      store_sums(gOut, place[1] == 0 ? params.stride_dv_row : params.stride_dk_row, sums, factors, exists, 0,
                 place[1] == 0 ? params.channels_v : params.channels_qk);
    } else {
      const float one[2] = {1.0f, 1.0f};
      if (chunk.continues_keys) add_sums(sums, gPart, exists);
      store_sums(gPart, WideShape::kColumns, sums, one, exists, 0, WideShape::kColumns);
    }
  }
}

}  // namespace perceiver
