#include "kernels/shared_kv_fwd_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_shared_kv_fwd<ElementType::kBFloat16, 512>(const SharedKVMaps&, const SharedKVForwardParams&);
template cudaError_t enqueue_shared_kv_fwd<ElementType::kFloat16, 512>(const SharedKVMaps&, const SharedKVForwardParams&);
}  // namespace perceiver
