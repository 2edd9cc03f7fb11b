// pack_inputs backward: dcontent = rstd (dy - mean(dy) - x_hat mean(dy x_hat)), of the packed rows x_hat and their gradient dy.
//
// Work: tiles of rows_per_tile rows, dealt round robin to a persistent grid; 8, 16 or 32 lanes own a row, two neighbouring
// channels a lane and step, one order of the sums. Tiles of dy and x_hat are copied through kPipelineSlots slots. Rows of
// dcontent start anywhere: a tile of them, one run that starts on 16 bytes, is put together in one of two places in shared
// memory, so that one barrier a tile does, and leaves from there. Shared memory: pack_backward_bytes. Device memory: rows
// (2 C_padded sizeof(Packed) + C_content sizeof(Content) + 4) bytes. FLOPs: 9 rows C. On any GPU.
#pragma once

#include "kernels/pack.cuh"

namespace perceiver {

// Resident blocks a multiprocessor: a lane holds two rows' values. plan_backward_tiles in backends/cuda/pack.py knows them too.
template <class Shape>
constexpr int kBackwardBlocksPerSm =
    Shape::kMaxChannels <= 384 ? 5 : Shape::kMaxChannels <= 512 ? 4 : Shape::kMaxChannels <= 768 ? 3 : 2;

// Bytes of a tile of packed rows, and of one of dcontent, in shared memory.
__host__ __device__ inline int packed_tile_bytes(const PackBackwardParams& params, int element_bytes) {
  return params.rows_per_tile * params.packed_channels * element_bytes;
}
__host__ __device__ inline int content_tile_bytes(const PackBackwardParams& params) {
  const int element_bytes = params.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 2;
  return params.rows_per_tile * params.content_channels * element_bytes;
}
__host__ __device__ inline int pack_backward_bytes(const PackBackwardParams& params, int element_bytes) {
  return TilePipeline<kPipelineSlots>::kHeaderBytes + 2 * kPipelineSlots * packed_tile_bytes(params, element_bytes) +
         2 * content_tile_bytes(params);
}

// One row's gradient, in place of dy.
template <class Shape>
__device__ __forceinline__ void differentiate_row(Row<Shape>& dy, const Row<Shape>& x_hat, float inverse_channels, float rstd) {
  float sum = 0.0f, product = 0.0f;
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum += dy.value[step][half];
      product = fmaf(dy.value[step][half], x_hat.value[step][half], product);
    }
  }
  const float mean = Row<Shape>::group_sum(sum) * inverse_channels;
  const float projection = Row<Shape>::group_sum(product) * inverse_channels;
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dy.value[step][half] = (dy.value[step][half] - mean - x_hat.value[step][half] * projection) * rstd;
    }
  }
}

// A lane's channels of a packed row, `left` of them to the row's last channel; what lies past that is padding and counts as 0.
template <typename Packed, class Shape>
__device__ __forceinline__ void read_packed(Row<Shape>& row, const Packed* sRow, int left) {
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int offset = Row<Shape>::offset(step);
    const float2 pair = Row<Shape>::contains(step, 0, left) ? load_pair(sRow + offset) : make_float2(0.0f, 0.0f);
    row.value[step][0] = pair.x;
    row.value[step][1] = Row<Shape>::contains(step, 1, left) ? pair.y : 0.0f;
  }
}

template <typename Content, class Shape>
__device__ __forceinline__ void write_row(const Row<Shape>& row, Content* sRow, int left) {
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = Row<Shape>::offset(step) + half;
      if (offset < left) sRow[offset] = from_float<Content>(row.value[step][half]);
    }
  }
}

template <class Shape>
__device__ __forceinline__ void write_row_as(int32_t type, const Row<Shape>& row, unsigned char* sTile, int element, int left) {
  // The type is chosen outside the loop over channels.
  switch (static_cast<ElementType>(type)) {
    case ElementType::kFloat32: return write_row(row, reinterpret_cast<float*>(sTile) + element, left);
    case ElementType::kFloat16: return write_row(row, reinterpret_cast<__half*>(sTile) + element, left);
    case ElementType::kBFloat16: return write_row(row, reinterpret_cast<__nv_bfloat16*>(sTile) + element, left);
  }
}

template <typename Packed, class Shape>
__global__ void __launch_bounds__(kPackThreads, kBackwardBlocksPerSm<Shape>)
    pack_bwd_kernel(const __grid_constant__ PackBackwardParams params) {
  extern __shared__ __align__(128) unsigned char sMemory[];
  constexpr int kRowsPerPass = kPackThreads / Shape::kLanes, kRowsPerWarp = 32 / Shape::kLanes;
  const int tile_bytes = packed_tile_bytes(params, sizeof(Packed)), out_bytes = content_tile_bytes(params);
  TilePipeline<kPipelineSlots> pipeline(sMemory, 2 * tile_bytes);
  unsigned char* sOut = sMemory + pack_backward_bytes(params, sizeof(Packed)) - 2 * out_bytes;
  const int lane = threadIdx.x % Shape::kLanes, group = threadIdx.x / Shape::kLanes;
  const int left = params.channels - 2 * lane, content_left = params.content_channels - 2 * lane;
  const float inverse_channels = 1.0f / static_cast<float>(params.channels);
  const TileGrid tiles(params.rows, params.rows_per_tile, 1);
  const auto fetch = [&](uint32_t turn, int tile) {
    const int row_bytes = params.packed_channels * static_cast<int>(sizeof(Packed)), bytes = tiles.rows(tile) * row_bytes;
    const int64_t offset = tiles.token(tile) * row_bytes;
    const Run runs[2] = {{static_cast<const unsigned char*>(params.dpacked) + offset, bytes, 0},
                         {static_cast<const unsigned char*>(params.packed) + offset, params.normalize ? bytes : 0, tile_bytes}};
    pipeline.fetch(turn, runs);
  };
  const auto compute = [&](int tile, const unsigned char* sSlot, unsigned char* sTile) {
    const auto* sDy = reinterpret_cast<const Packed*>(sSlot);
    const auto* sXHat = reinterpret_cast<const Packed*>(sSlot + tile_bytes);
    const int rows = tiles.rows(tile);
    // The rows of a warp start and end the loop together, so that the sums over lanes are complete.
    for (int warp_row = group - group % kRowsPerWarp; warp_row < rows; warp_row += kRowsPerPass) {
      const int r = warp_row + group % kRowsPerWarp, readable = min(r, rows - 1);
      const int offset = readable * params.packed_channels + 2 * lane;
      Row<Shape> dy, x_hat;
      read_packed(dy, sDy + offset, left);
      if (params.normalize) {
        read_packed(x_hat, sXHat + offset, left);
        differentiate_row(dy, x_hat, inverse_channels, __ldg(params.rstd + tiles.token(tile) + readable));
      }
      if (r < rows) write_row_as(params.content_type, dy, sTile, r * params.content_channels + 2 * lane, content_left);
    }
  };
  const auto leave = [&](int tile, const unsigned char* sTile) {
    const int row_bytes = out_bytes / params.rows_per_tile, bytes = tiles.rows(tile) * row_bytes;
    auto* gTile = static_cast<unsigned char*>(params.dcontent) + tiles.token(tile) * row_bytes;
    pipeline.store(gTile, sTile, bytes);
    // The last tile may end within 16 bytes.
    if (const int at = (bytes & ~15) + static_cast<int>(threadIdx.x); at < bytes) gTile[at] = sTile[at];
  };
  walk_tiles(pipeline, tiles, sOut, out_bytes, fetch, compute, leave);
}

}  // namespace perceiver
