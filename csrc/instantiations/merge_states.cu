#include "kernels/merge_states.cuh"
#include "kernels/shared_kv_enqueue.h"

namespace perceiver {

namespace {

template <class Out, int kGroups, bool kStates>
cudaError_t enqueue(const MergeStatesParams& params) {
  constexpr int kPlaces = kMergeThreads / kGroups;
  const int64_t places = int64_t{params.batch} * params.rows * (params.channels / 4);
  const auto blocks = static_cast<unsigned>((places + kPlaces - 1) / kPlaces);
  merge_states_kernel<Out, kGroups, kStates><<<blocks, kMergeThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(params);
  return cudaGetLastError();
}

// Many splits are those of few rows, which would be few threads.
template <class Out>
cudaError_t enqueue(const MergeStatesParams& params) {
  if (params.lse == nullptr) return params.splits > 8 ? enqueue<Out, 8, false>(params) : enqueue<Out, 1, false>(params);
  return params.splits > 8 ? enqueue<Out, 8, true>(params) : enqueue<Out, 1, true>(params);
}

}  // namespace

cudaError_t enqueue_merge_states(const MergeStatesParams& params) {
  switch (static_cast<ElementType>(params.z_type)) {
    case ElementType::kFloat32: return enqueue<float>(params);
    case ElementType::kFloat16: return enqueue<__half>(params);
    case ElementType::kBFloat16: return enqueue<__nv_bfloat16>(params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace perceiver
