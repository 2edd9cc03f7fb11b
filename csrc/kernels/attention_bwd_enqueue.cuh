// Starts the kernels of attention's backward of one head width and element type.
#pragma once

#include "kernels/attention_bwd_ends.cuh"

namespace perceiver {

template <ElementType kElement, int kColumns>
cudaError_t enqueue_attention_bwd(const AttentionBackwardMaps& maps, const AttentionBackwardParams& params) {
  using Element = typename ElementOf<kElement>::Type;
  using Shape = BackwardShapeOf<kColumns>;
  static_assert(Shape::kSharedBytes <= 232448, "a block may have 227 KiB of shared memory");
  const auto stream = static_cast<cudaStream_t>(params.stream);
  const auto query_blocks = static_cast<unsigned>(params.batch) * params.heads * params.query_blocks;
  const auto kernel = &attention_bwd_kernel<Element, Shape>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  attention_bwd_rows_kernel<Element, Shape><<<query_blocks, kRowThreads, 0, stream>>>(params);
  kernel<<<params.blocks, kBlockThreads, Shape::kSharedBytes, stream>>>(maps, params);
  if (params.splits > 1) {
    attention_bwd_dq_kernel<Element, Shape><<<query_blocks * kConsumers, kWarpgroup, 0, stream>>>(params);
  }
  if (params.slices > 1) sum_slices<Element, kColumns>(params);
  return cudaGetLastError();
}

}  // namespace perceiver
