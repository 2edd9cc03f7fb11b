// Starts the kernels of the gradients of shared-KV attention, of one width and element type.
#pragma once

#include "kernels/shared_kv_bwd_dq.cuh"
#include "kernels/shared_kv_bwd_dx.cuh"

namespace perceiver {

// Columns, tokens of a tile, stages, queries and dz, whether tails are narrow: as many stages as fit 227 KiB beside the rows.
template <int kColumns>
struct SharedKVQueryGradientShapeOf;
template <>
struct SharedKVQueryGradientShapeOf<64> : SharedKVShape<64, 128, 4, 2> {};
template <>
struct SharedKVQueryGradientShapeOf<128> : SharedKVShape<128, 96, 4, 2> {};
template <>
struct SharedKVQueryGradientShapeOf<256> : SharedKVShape<256, 64, 3, 2> {};
template <>
struct SharedKVQueryGradientShapeOf<272> : SharedKVShape<272, 64, 2, 2> {};
template <>
struct SharedKVQueryGradientShapeOf<336> : SharedKVShape<336, 32, 2, 2> {};

// Columns, query rows of a tile, stages, whether tails are narrow.
template <int kColumns>
struct SharedKVTokenGradientShapeOf;
template <>
struct SharedKVTokenGradientShapeOf<64> : SharedKVTokenGradientShape<64, 128, 3> {};
template <>
struct SharedKVTokenGradientShapeOf<128> : SharedKVTokenGradientShape<128, 128, 2> {};
template <>
struct SharedKVTokenGradientShapeOf<256> : SharedKVTokenGradientShape<256, 64, 2> {};
template <>
struct SharedKVTokenGradientShapeOf<272> : SharedKVTokenGradientShape<272, 64, 2, true> {};
template <>
struct SharedKVTokenGradientShapeOf<336> : SharedKVTokenGradientShape<336, 32, 2> {};

template <class Kernel>
cudaError_t enqueue_gradient(Kernel* kernel, int64_t blocks, int shared_bytes, const SharedKVBackwardMaps& maps,
                             const SharedKVBackwardParams& params) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(params.stream);
  kernel<<<static_cast<unsigned>(blocks), kBlockThreads, shared_bytes, stream>>>(maps, params);
  return cudaGetLastError();
}

template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_bwd_dq(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = SharedKVQueryGradientShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  static_assert(Shape::kBlockKV == shared_kv_dq_block_kv(kColumns), "launch.cpp describes tiles of this size");
  static_assert(Shape::kBlockQ == shared_kv_block_q(kColumns), "rules.cpp counts blocks of this size");
  const int64_t row_blocks = (int64_t{params.rows} + Shape::kBlockQ - 1) / Shape::kBlockQ;
  return enqueue_gradient(&shared_kv_bwd_dq_kernel<Element, Shape>, row_blocks * params.splits * params.batch,
                          Shape::kSharedBytes, maps, params);
}

template <ElementType kElement, int kColumns>
cudaError_t enqueue_shared_kv_bwd_dx(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = SharedKVTokenGradientShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  static_assert(Shape::kBlockQ == shared_kv_dx_block_q(kColumns), "launch.cpp describes tiles of this size");
  return enqueue_gradient(&shared_kv_bwd_dx_kernel<Element, Shape>, params.blocks, Shape::kSharedBytes, maps, params);
}

}  // namespace perceiver
