#include "kernels/shared_kv_bwd_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_shared_kv_bwd_dq<ElementType::kBFloat16, 256>(const SharedKVBackwardMaps&, const SharedKVBackwardParams&);
template cudaError_t enqueue_shared_kv_bwd_dq<ElementType::kFloat16, 256>(const SharedKVBackwardMaps&, const SharedKVBackwardParams&);
}  // namespace perceiver
