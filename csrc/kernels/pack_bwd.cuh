// pack_inputs backward: dcontent = rstd (dy - mean(dy) - x_hat mean(dy x_hat)), of the packed rows x_hat and their gradient dy.
//
// Work: a block per tile of rows_per_tile rows; 8, 16 or 32 lanes own a row, two neighbouring channels a lane and step, one order
// of the sums. Packed rows are whole pairs and are read as such. Rows of dcontent start anywhere: a tile of them, one run that
// starts on 16 bytes, is put together in shared memory and leaves as vectors. Shared memory: rows_per_tile C sizeof(Content).
// Device memory: rows (2 C_padded sizeof(Packed) + C sizeof(Content) + 4) bytes. FLOPs: 9 rows C. On any GPU.
#pragma once

#include "kernels/pack.cuh"

namespace perceiver {

// Resident blocks a multiprocessor: a lane holds two rows' values, and all loads of a row are in flight at once.
template <class Shape>
constexpr int kBackwardBlocksPerSm = Shape::kMaxChannels <= 384 ? 5 : Shape::kMaxChannels <= 512 ? 4 : 2;

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
__device__ __forceinline__ void read_packed(Row<Shape>& row, const Packed* gRow, int left) {
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    const int offset = Row<Shape>::offset(step);
    const float2 pair = offset < left ? load_pair(gRow + offset) : make_float2(0.0f, 0.0f);
    row.value[step][0] = pair.x;
    row.value[step][1] = offset + 1 < left ? pair.y : 0.0f;
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

template <typename Packed, class Shape>
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
  extern __shared__ __align__(16) unsigned char sTile[];
  constexpr int kRowsPerPass = kPackThreads / Shape::kLanes, kRowsPerWarp = 32 / Shape::kLanes;
  const int lane = threadIdx.x % Shape::kLanes, group = threadIdx.x / Shape::kLanes;
  const int left = params.channels - 2 * lane, content_left = params.content_channels - 2 * lane;
  const float inverse_channels = 1.0f / static_cast<float>(params.channels);
  const int64_t first = int64_t{blockIdx.x} * params.rows_per_tile;
  const int rows = static_cast<int>(min(int64_t{params.rows_per_tile}, params.rows - first));
  // The rows of a warp start and end the loop together, so that the sums over lanes are complete.
  for (int warp_row = group - group % kRowsPerWarp; warp_row < rows; warp_row += kRowsPerPass) {
    const int r = warp_row + group % kRowsPerWarp, readable = min(r, rows - 1);
    const int64_t offset = (first + readable) * params.packed_channels + 2 * lane;
    Row<Shape> dy, x_hat;
    read_packed(dy, static_cast<const Packed*>(params.dpacked) + offset, left);
    if (params.normalize) {
      read_packed(x_hat, static_cast<const Packed*>(params.packed) + offset, left);
      differentiate_row(dy, x_hat, inverse_channels, params.rstd[first + readable]);
    }
    if (r < rows) {
      write_row_as<Packed>(params.content_type, dy, sTile, r * params.content_channels + 2 * lane, content_left);
    }
  }
  __syncthreads();
  const int element_bytes = params.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 2;
  const int bytes = rows * params.content_channels * element_bytes, vector_bytes = bytes & ~15;
  auto* gTile = static_cast<unsigned char*>(params.dcontent) + first * params.content_channels * element_bytes;
  for (int at = 16 * threadIdx.x; at < vector_bytes; at += 16 * kPackThreads) {
    *reinterpret_cast<uint4*>(gTile + at) = *reinterpret_cast<const uint4*>(sTile + at);
  }
  // The last tile may end within 16 bytes.
  if (const int at = vector_bytes + static_cast<int>(threadIdx.x); at < bytes) gTile[at] = sTile[at];
}

}  // namespace perceiver
