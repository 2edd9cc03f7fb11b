#include "kernels/attention_fwd_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_attention_fwd<ElementType::kBFloat16, 64>(const AttentionMaps&, const AttentionForwardParams&);
template cudaError_t enqueue_attention_fwd<ElementType::kFloat16, 64>(const AttentionMaps&, const AttentionForwardParams&);
}  // namespace perceiver
