// Starts the attention forward kernel of one head width and element type.
#pragma once

#include "kernels/attention_fwd.cuh"

namespace perceiver {

// Columns, keys of a tile, stages, those of the queries, whether warpgroups take turns. In ms on an H200: 128 channels, 512 x 512 in 256 heads 0.0742
// with turns and 0.0762 without, 64 keys a tile 0.080; 64 channels 0.105 and 0.107, 64 keys 0.115; 256 channels, 1,048,576 x 512
// 0.844 with tiles of 64 keys and 0.890 with 80.
template <int kColumns>
struct AttentionShapeOf;
template <>
struct AttentionShapeOf<64> : AttentionShape<64, 128, 4, 2, false> {};
template <>
struct AttentionShapeOf<128> : AttentionShape<128, 128, 2, 2, true> {};
template <>
struct AttentionShapeOf<256> : AttentionShape<256, 64, 2, 1, false> {};

template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_fwd(const AttentionMaps& maps, const AttentionForwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = AttentionShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  static_assert(Shape::kBlockKV == attention_block_kv(kColumns), "launch.cpp describes tiles of this size");
  const auto kernel = &attention_fwd_kernel<Element, Shape>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<params.blocks, kBlockThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(params.stream)>>>(maps, params);
  return cudaGetLastError();
}

}  // namespace perceiver
