// pack_inputs forward: packed[b, m] = cast(pad((x - mean(x)) * rstd)), x = content[b, m] ++ positions[b, m].
// Work: tiles of rows_per_tile rows, dealt round robin to a persistent grid; 8, 16 or 32 lanes own a row.
// pack_flat_kernel: content is one aligned run and batch is 1, copied tile by tile through kPipelineSlots slots. A tile of the
// result is put together in one of two places in shared memory and leaves from there: a row that a warp stores starts anywhere.
// pack_strided_kernel: any strides and positions, read channel by channel from device memory.
// Shared memory: flat pack_flat_bytes, else none.
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
// A turn of a tile of 16 rows takes a block some 2.6 us of the 122 of 8 x 50,176 on an H200, a copy 1 or 2: two slots hide it.
constexpr int kPipelineSlots = 2;

// Resident blocks per multiprocessor; plan_tiles in backends/cuda/pack.py sizes grid and tiles by the same figures.
template <class Shape>
constexpr int kFlatBlocksPerSm = Shape::kMaxChannels <= 64 ? 6 : 3;

// The strided kernel holds a row's addresses beside its values: 128 registers, 255 past 512 channels.
template <class Shape>
constexpr int kStridedBlocksPerSm = Shape::kMaxChannels <= 512 ? 2 : 1;

__host__ __device__ inline int pack_slot_bytes(const PackForwardParams& params, int element_bytes) {
  return (params.rows_per_tile * params.content_channels * element_bytes + 127) / 128 * 128;
}

__host__ __device__ inline int pack_out_bytes(const PackForwardParams& params, int element_bytes) {
  return params.rows_per_tile * params.packed_channels * element_bytes;
}
__host__ __device__ inline int pack_flat_bytes(const PackForwardParams& params, int content_bytes, int packed_bytes) {
  return TilePipeline<kPipelineSlots>::kHeaderBytes + kPipelineSlots * pack_slot_bytes(params, content_bytes) +
         2 * pack_out_bytes(params, packed_bytes);
}

// Tiles of rows_per_tile rows of each batch entry, dealt to a grid in turn: block b has tiles b, b + gridDim.x, ...
struct TileGrid {
  int rows_per_tile, batch, per_entry, last_rows;

  __device__ __forceinline__ TileGrid(int64_t tokens, int rows_per_tile, int64_t batch)
      : rows_per_tile(rows_per_tile), batch(static_cast<int>(batch)),
        per_entry(static_cast<int>((tokens + rows_per_tile - 1) / rows_per_tile)),
        last_rows(static_cast<int>(tokens - int64_t{per_entry - 1} * rows_per_tile)) {}

  __device__ __forceinline__ int count() const { return batch * per_entry; }
  __device__ __forceinline__ int entry(int tile) const { return batch == 1 ? 0 : tile / per_entry; }
  // The first token of the tile in its entry.
  __device__ __forceinline__ int64_t token(int tile) const {
    return int64_t{tile - entry(tile) * per_entry} * rows_per_tile;
  }
  // None past the last tile.
  __device__ __forceinline__ int rows(int tile) const {
    const int left = (entry(tile) + 1) * per_entry - tile;
    return tile >= count() ? 0 : left == 1 ? last_rows : rows_per_tile;
  }
};

// Packs the rows of one tile, which starts at `out`, all threads of the block together; fill(row, r, left) reads its row r.
template <typename Packed, class Shape, class Fill>
__device__ __forceinline__ void pack_tile(const PackForwardParams& params, const TileGrid& tiles, int tile, Packed* out,
                                          float inverse_channels, Fill fill) {
  constexpr int kRowsPerWarp = 32 / Shape::kLanes;
  constexpr int kRowsPerPass = kPackThreads / Shape::kLanes;
  const int lane = threadIdx.x % Shape::kLanes;
  const int group = threadIdx.x / Shape::kLanes;
  const int left = params.content_channels + params.position_channels - 2 * lane;
  const float channels = static_cast<float>(params.content_channels + params.position_channels);
  const int stored_left = params.packed_channels - 2 * lane;
  const int rows = tiles.rows(tile);

  float* rstd_out = static_cast<float*>(params.rstd) + tiles.entry(tile) * params.tokens + tiles.token(tile) + group;
  const auto* mask = static_cast<const unsigned char*>(params.key_mask);
  if (mask != nullptr) {
    mask += tiles.entry(tile) * params.stride_key_mask_batch + tiles.token(tile) * params.stride_key_mask_token;
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
      rstd = row.centre(left, channels, inverse_channels, params.eps);
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
          store_pair(out + r * params.packed_channels + 2 * lane + offset, row.value[step][0], row.value[step][1]);
        }
      }
    }
    rstd_out += kRowsPerPass;
  }
}

// Walks the block's tiles: fetch(turn, tile) copies one ahead, compute(tile, sTile, sResults) puts its results together in one
// of two places at sOut, from where leave(tile, sResults) stores them. Before turn t, the tiles of turns
// t .. t + kPipelineSlots - 1 are in flight or in shared memory.
template <class Fetch, class Compute, class Leave>
__device__ __forceinline__ void walk_tiles(TilePipeline<kPipelineSlots>& pipeline, const TileGrid& tiles, unsigned char* sOut,
                                           int out_bytes, Fetch fetch, Compute compute, Leave leave) {
  int tile = blockIdx.x;
  const int count = tiles.count(), stride = gridDim.x;
  for (uint32_t turn = 0; turn < kPipelineSlots; ++turn) {
    if (pipeline.fetches()) fetch(turn, tile + turn * stride);
  }
  __syncthreads();
  for (uint32_t turn = 0; tile < count; ++turn, tile += stride) {
    unsigned char* sResults = sOut + turn % 2 * out_bytes;
    compute(tile, pipeline.wait(turn), sResults);
    pipeline.finish_results();
    __syncthreads();
    if (pipeline.fetches()) fetch(turn + kPipelineSlots, tile + kPipelineSlots * stride);
    leave(tile, sResults);
  }
  pipeline.finish_stores();
}

template <typename Content, typename Packed, class Shape>
__global__ void __launch_bounds__(kPackThreads, kFlatBlocksPerSm<Shape>)
    pack_flat_kernel(const __grid_constant__ PackForwardParams params) {
  extern __shared__ __align__(128) unsigned char sMemory[];
  const int slot_bytes = pack_slot_bytes(params, sizeof(Content)), out_bytes = pack_out_bytes(params, sizeof(Packed));
  TilePipeline<kPipelineSlots> pipeline(sMemory, slot_bytes);
  unsigned char* sOut = sMemory + pipeline.kHeaderBytes + kPipelineSlots * slot_bytes;
  const int channels = params.content_channels;
  const float inverse_channels = 1.0f / static_cast<float>(channels);

  const TileGrid tiles(params.tokens, params.rows_per_tile, 1);
  const auto fetch = [&](uint32_t turn, int tile) {
    const auto* source = static_cast<const Content*>(params.content) + tiles.token(tile) * channels;
    const int bytes = tiles.rows(tile) * channels * static_cast<int>(sizeof(Content));
    const Run runs[1] = {{reinterpret_cast<const unsigned char*>(source), bytes, 0}};
    pipeline.fetch(turn, runs);
  };
  const auto compute = [&](int tile, const unsigned char* sTile, unsigned char* sPacked) {
    const auto fill = [&](Row<Shape>& row, int r, int left) {
      const Content* sRow = reinterpret_cast<const Content*>(sTile) + r * channels + (channels - left);
      row.fill(left, [&](int offset) { return to_float(sRow[offset]); });
    };
    pack_tile<Packed, Shape>(params, tiles, tile, reinterpret_cast<Packed*>(sPacked), inverse_channels, fill);
  };
  const auto leave = [&](int tile, const unsigned char* sPacked) {
    const int row_bytes = params.packed_channels * static_cast<int>(sizeof(Packed));
    pipeline.store(static_cast<unsigned char*>(params.packed) + tiles.token(tile) * row_bytes, sPacked,
                   tiles.rows(tile) * row_bytes);
  };
  walk_tiles(pipeline, tiles, sOut, out_bytes, fetch, compute, leave);
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
  const TileGrid tiles(params.tokens, params.rows_per_tile, params.batch);
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int64_t entry = tiles.entry(tile), row = entry * params.tokens + tiles.token(tile);
    Packed* out = static_cast<Packed*>(params.packed) + row * params.packed_channels;
    pack_tile<Packed, Shape>(params, tiles, tile, out, inverse_channels, [&](Row<Shape>& values, int r, int left) {
      const int64_t token = tiles.token(tile) + r;
      values.clear();
      read_channels_of(params.content_type, values, params.content,
                       entry * params.stride_content_batch + token * params.stride_content_token,
                       params.stride_content_channel, channels - left, 0, params.content_channels);
      read_channels_of(params.positions_type, values, params.positions,
                       entry * params.stride_positions_batch + token * params.stride_positions_token,
                       params.stride_positions_channel, channels - left, params.content_channels,
                       params.position_channels);
    });
  }
}

}  // namespace perceiver
