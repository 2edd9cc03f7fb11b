// pack_inputs forward: packed[b, m] = cast(pad((x - mean(x)) * rstd)), x = content[b, m] ++ positions[b, m].
// Work: tiles of rows_per_tile rows, dealt round robin to a persistent grid; 8, 16 or 32 lanes own a row.
// pack_flat_kernel: content[b] is one aligned run, copied tile by tile through kPipelineSlots slots.
// pack_strided_kernel: any strides and positions, read channel by channel from device memory.
// Shared memory: flat 128 + kPipelineSlots * round_up(rows_per_tile * C * sizeof(Content), 128), else none.
// Device memory: B * M * (C * sizeof(Content) + C_padded * sizeof(Packed) + 4) bytes. FLOPs: 7 * B * M * C.
// Bound by device memory; wins where contiguous rows are not whole 16-byte vectors (C = 261).
#pragma once

#include <cuda_runtime.h>

#include "perceiver/device/element.cuh"
#include "perceiver/device/row.cuh"
#include "perceiver/device/tile_pipeline.cuh"
#include "perceiver/params.h"

namespace perceiver {

constexpr int kPackThreads = 256;
// At the bandwidth of an H200 a block has some 6 us per tile (6 blocks, 34 KB in and out), a copy takes 1 or
// 2: two slots hide it, and small blocks leave room for many warps.
constexpr int kPipelineSlots = 2;

// Resident blocks per multiprocessor: 6 leave 40 registers a thread, enough up to 384 channels; 4 leave 64.
// plan_tiles in backends/cuda/pack.py sizes grid and tiles by the same figures.
template <class Shape>
constexpr int kFlatBlocksPerSm = Shape::kMaxChannels <= 384 ? 6 : 4;

// The strided kernel holds a row's addresses beside its values: 128 registers, 255 past 512 channels.
template <class Shape>
constexpr int kStridedBlocksPerSm = Shape::kMaxChannels <= 512 ? 2 : 1;

__host__ __device__ inline int pack_slot_bytes(const PackForwardParams& params, int element_bytes) {
  return (params.rows_per_tile * params.content_channels * element_bytes + 127) / 128 * 128;
}

// Walks the tiles of one block: tile blockIdx.x of all, then every gridDim.x-th. Divides at the start only.
class TileCursor {
 public:
  __device__ explicit TileCursor(const PackForwardParams& params)
      : batches_(static_cast<uint32_t>(params.batch)),
        tiles_per_batch_(
            static_cast<uint32_t>((params.tokens + params.rows_per_tile - 1) / params.rows_per_tile)),
        rows_per_tile_(params.rows_per_tile),
        last_rows_(
            static_cast<int>(params.tokens - static_cast<int64_t>(tiles_per_batch_ - 1) * rows_per_tile_)),
        step_batches_(gridDim.x / tiles_per_batch_),
        step_tiles_(gridDim.x % tiles_per_batch_),
        batch_(blockIdx.x / tiles_per_batch_),
        tile_(blockIdx.x % tiles_per_batch_) {}

  __device__ void advance() {
    batch_ += step_batches_;
    tile_ += step_tiles_;
    if (tile_ >= tiles_per_batch_) {
      tile_ -= tiles_per_batch_;
      ++batch_;
    }
  }

  __device__ bool done() const { return batch_ >= batches_; }
  __device__ int64_t batch() const { return batch_; }
  // The first token of the tile.
  __device__ int64_t token() const { return static_cast<int64_t>(tile_) * rows_per_tile_; }
  __device__ int rows() const { return tile_ + 1 == tiles_per_batch_ ? last_rows_ : rows_per_tile_; }

 private:
  uint32_t batches_, tiles_per_batch_;
  int rows_per_tile_, last_rows_;
  uint32_t step_batches_, step_tiles_, batch_, tile_;
};

// Packs the rows of one tile, all threads of the block together; fill(row, r, left) reads row r of the tile.
template <typename Packed, class Shape, class Fill>
__device__ __forceinline__ void pack_tile(const PackForwardParams& params, const TileCursor& tile,
                                          float inverse_channels, Fill fill) {
  constexpr int kRowsPerWarp = 32 / Shape::kLanes;
  constexpr int kRowsPerPass = kPackThreads / Shape::kLanes;
  const int lane = threadIdx.x % Shape::kLanes;
  const int group = threadIdx.x / Shape::kLanes;
  const int left = params.content_channels + params.position_channels - 2 * lane;
  const int stored_left = params.packed_channels - 2 * lane;
  const int rows = tile.rows();

  const int64_t first_row = tile.batch() * params.tokens + tile.token() + group;
  Packed* out = static_cast<Packed*>(params.packed) + first_row * params.packed_channels + 2 * lane;
  float* rstd_out = static_cast<float*>(params.rstd) + first_row;
  const auto* mask = static_cast<const unsigned char*>(params.key_mask);
  if (mask != nullptr) {
    mask += tile.batch() * params.stride_key_mask_batch + tile.token() * params.stride_key_mask_token;
  }

  // The rows of a warp start and end the loop together, so that the sums over lanes are complete.
  for (int warp_row = group - group % kRowsPerWarp; warp_row < rows; warp_row += kRowsPerPass) {
    const int r = warp_row + group % kRowsPerWarp;
    const bool exists = kRowsPerWarp == 1 || r < rows;
    const int readable = exists ? r : 0;
    Row<Shape> row;
    fill(row, readable, left);
    float rstd = 1.0f;
    if (params.normalize) {
      rstd = row.centre(left, inverse_channels, params.eps);
      row.scale(rstd);
    }
    // After the sums, so that no lane misses them. What a masked token holds, NaN too, goes no further.
    if (mask != nullptr && __ldg(mask + readable * params.stride_key_mask_token) == 0) {
      row.clear();
      rstd = 0.0f;
    }
    if (exists) {
      if (params.normalize && lane == 0) *rstd_out = rstd;
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        const int offset = Row<Shape>::offset(step);
        if (step < Shape::kFullSteps || offset < stored_left) {
          store_pair(out + offset, row.value[step][0], row.value[step][1]);
        }
      }
    }
    out += kRowsPerPass * params.packed_channels;
    rstd_out += kRowsPerPass;
  }
}

template <typename Content, typename Packed, class Shape>
__global__ void __launch_bounds__(kPackThreads, kFlatBlocksPerSm<Shape>)
    pack_flat_kernel(const __grid_constant__ PackForwardParams params) {
  extern __shared__ __align__(128) unsigned char sMemory[];
  TilePipeline<kPipelineSlots> pipeline(sMemory, pack_slot_bytes(params, sizeof(Content)));
  const int channels = params.content_channels;
  const float inverse_channels = 1.0f / static_cast<float>(channels);

  auto fetch = [&](uint32_t turn, const TileCursor& tile) {
    if (!pipeline.fetches()) return;
    const auto* content = static_cast<const Content*>(params.content);
    int bytes = 0;
    if (!tile.done()) {
      content += tile.batch() * params.stride_content_batch + tile.token() * channels;
      bytes = tile.rows() * channels * static_cast<int>(sizeof(Content));
    }
    pipeline.fetch(turn, reinterpret_cast<const unsigned char*>(content), bytes);
  };

  TileCursor tile(params);
  TileCursor ahead = tile;
  for (uint32_t turn = 0; turn < kPipelineSlots; ++turn, ahead.advance()) fetch(turn, ahead);
  __syncthreads();

  // Before turn t, the tiles of turns t .. t + kPipelineSlots - 1 are in flight or in shared memory.
  for (uint32_t turn = 0; !tile.done(); ++turn, tile.advance(), ahead.advance()) {
    const auto* sTile = reinterpret_cast<const Content*>(pipeline.wait(turn));
    pack_tile<Packed, Shape>(params, tile, inverse_channels, [&](Row<Shape>& row, int r, int left) {
      const Content* sRow = sTile + r * channels + (channels - left);
      row.fill(left, [&](int offset) { return to_float(sRow[offset]); });
    });
    __syncthreads();
    fetch(turn + kPipelineSlots, ahead);
  }
}

// Fills channels [first, first + count) of `row` from `elements`; `channel` is the first that the lane holds.
template <typename Element, class Shape>
__device__ __forceinline__ void read_channels(Row<Shape>& row, const Element* elements, int64_t stride,
                                              int channel, int first, int count) {
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = channel + Row<Shape>::offset(step) + half - first;
      if (c >= 0 && c < count) row.value[step][half] = to_float(__ldg(elements + c * stride));
    }
  }
}

template <class Shape>
__device__ __forceinline__ void read_channels_of(int32_t type, Row<Shape>& row, const void* data,
                                                 int64_t offset, int64_t stride, int channel, int first,
                                                 int count) {
  // The type is chosen outside the loop over channels, so that a row's loads are all in flight at once.
  switch (static_cast<ElementType>(type)) {
    case ElementType::kFloat32:
      return read_channels(row, static_cast<const float*>(data) + offset, stride, channel, first, count);
    case ElementType::kFloat16:
      return read_channels(row, static_cast<const __half*>(data) + offset, stride, channel, first, count);
    case ElementType::kBFloat16:
      return read_channels(row, static_cast<const __nv_bfloat16*>(data) + offset, stride, channel, first,
                           count);
  }
}

template <typename Packed, class Shape>
__global__ void __launch_bounds__(kPackThreads, kStridedBlocksPerSm<Shape>)
    pack_strided_kernel(const __grid_constant__ PackForwardParams params) {
  const int channels = params.content_channels + params.position_channels;
  const float inverse_channels = 1.0f / static_cast<float>(channels);
  for (TileCursor tile(params); !tile.done(); tile.advance()) {
    pack_tile<Packed, Shape>(params, tile, inverse_channels, [&](Row<Shape>& row, int r, int left) {
      const int64_t token = tile.token() + r;
      row.clear();
      read_channels_of(params.content_type, row, params.content,
                       tile.batch() * params.stride_content_batch + token * params.stride_content_token,
                       params.stride_content_channel, channels - left, 0, params.content_channels);
      read_channels_of(params.positions_type, row, params.positions,
                       tile.batch() * params.stride_positions_batch + token * params.stride_positions_token,
                       params.stride_positions_channel, channels - left, params.content_channels,
                       params.position_channels);
    });
  }
}

}  // namespace perceiver
