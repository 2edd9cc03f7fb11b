// What the forward kernels of shared-KV attention share: the visibility of a block's tokens, and the softmax state of its rows
// that it leaves.
#pragma once

#include "kernels/forward_rows.cuh"
#include "kernels/shared_kv_work.cuh"
#include "perceiver/device/barrier.cuh"

namespace perceiver {

// One bit a token of every tile, by one warp: set where it is visible and inside the split. A tile's mask is read while the warp
// waits for the place of the tile before it.
template <class Shape, class Memory>
__device__ __forceinline__ void load_visibility(Memory memory, const SharedKVForwardParams& params,
                                                const SharedKVWork& work) {
  const int lane = threadIdx.x % 32;
  const auto* gMask = static_cast<const unsigned char*>(params.key_mask) + int64_t{work.entry} * params.tokens;
  int mask[Shape::kMaskWords];
  const auto read = [&](int tile) {
#pragma unroll
    for (int word = 0; word < Shape::kMaskWords; ++word) {
      const int in_tile = 32 * word + lane, token = work.token_begin + tile * Shape::kBlockKV + in_tile;
      mask[word] = in_tile < Shape::kBlockKV && token < work.token_end ? gMask[token] : 0;
    }
  };
  read(0);
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < work.tiles; ++tile, turn.next()) {
    wait(memory.visible_empty(turn.stage), turn.parity ^ 1);
#pragma unroll
    for (int word = 0; word < Shape::kMaskWords; ++word) {
      const uint32_t visible = __ballot_sync(0xffffffffu, mask[word] != 0);
      if (lane == 0) store_shared(memory.visible(turn.stage, word), visible);
    }
    if (lane == 0) arrive(memory.visible_full(turn.stage));
    read(tile + 1);
  }
}

// Writes the sums, which begin with column first_column, and with `whole` what there is once a row.
template <class Element, class Shape>
__device__ __forceinline__ void store_state(ForwardRows<Element, Shape>& rows, const SharedKVForwardParams& params,
                                            const SharedKVWork& work, int row_in_block, int first_column, bool whole) {
  const int row = work.row + row_in_block;
  const int64_t flat_row = (int64_t{work.entry} * params.splits + work.split) * params.rows + row;
  const bool exists[2] = {row < params.rows, row + 8 < params.rows};
  float inverse[2], lse[2];
  finish_totals(rows, inverse, lse);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (whole && threadIdx.x % 4 == 0 && exists[half]) {
      params.lse_out[flat_row + 8 * half] = lse[half];
      if (params.rho_out != nullptr) params.rho_out[flat_row + 8 * half] = rows.total[half] == 0.0f ? 0.0f : 1.0f;
    }
  }
  const int64_t offset = flat_row * params.channels;
  if (params.z_out_type == static_cast<int32_t>(ElementType::kFloat32)) {
    rows.store(static_cast<float*>(params.z_out) + offset, params.channels, inverse, exists, first_column);
  } else {
    rows.store(static_cast<Element*>(params.z_out) + offset, params.channels, inverse, exists, first_column);
  }
}

}  // namespace perceiver
