// Starts the attention forward kernel of one head width and element type.
#pragma once

#include "kernels/attention_fwd.cuh"

namespace perceiver {

// Columns, keys of a tile, stages: as many stages as fit 227 KiB beside the queries.
template <int kColumns>
struct AttentionShapeOf;
template <>
struct AttentionShapeOf<64> : AttentionShape<64, 128, 4> {};
template <>
struct AttentionShapeOf<128> : AttentionShape<128, 128, 2> {};
template <>
struct AttentionShapeOf<256> : AttentionShape<256, 80, 2> {};

template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_fwd(const AttentionMaps& maps, const AttentionForwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = AttentionShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  static_assert(Shape::kBlockKV == attention_block_kv(kColumns), "launch.cpp describes tiles of this size");
  const auto kernel = &attention_fwd_kernel<Element, Shape>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<params.blocks, kForwardThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(params.stream)>>>(maps, params);
  return cudaGetLastError();
}

}  // namespace perceiver
