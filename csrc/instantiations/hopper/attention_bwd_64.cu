#include "kernels/attention_bwd_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_attention_bwd<ElementType::kBFloat16, 64>(const AttentionBackwardMaps&, const AttentionBackwardParams&);
template cudaError_t enqueue_attention_bwd<ElementType::kFloat16, 64>(const AttentionBackwardMaps&, const AttentionBackwardParams&);
}  // namespace perceiver
