#include "kernels/attention_bwd_wide_enqueue.cuh"

namespace perceiver {
template cudaError_t enqueue_attention_bwd_wide<ElementType::kBFloat16>(const AttentionBackwardMaps&, const AttentionBackwardParams&);
template cudaError_t enqueue_attention_bwd_wide<ElementType::kFloat16>(const AttentionBackwardMaps&, const AttentionBackwardParams&);
}  // namespace perceiver
