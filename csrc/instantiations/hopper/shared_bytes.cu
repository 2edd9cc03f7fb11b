#include "kernels/attention_bwd_enqueue.cuh"
#include "kernels/attention_bwd_wide_enqueue.cuh"
#include "kernels/attention_fwd_enqueue.cuh"
#include "kernels/shared_kv_bwd_enqueue.cuh"
#include "kernels/shared_kv_fwd_enqueue.cuh"

namespace perceiver {

int shared_kv_shared_bytes(int columns) {
  switch (columns) {
    case 64: return SharedKVShapeOf<64>::kSharedBytes;
    case 128: return SharedKVShapeOf<128>::kSharedBytes;
    case 256: return SharedKVShapeOf<256>::kSharedBytes;
    case 272: return SharedKVShapeOf<272>::kSharedBytes;
    case 336: return SharedKVShapeOf<336>::kSharedBytes;
    case 512: return SharedKVShapeOf<512>::kSharedBytes;
  }
  return 0;
}

int shared_kv_bwd_dq_shared_bytes(int columns) {
  switch (columns) {
    case 64: return SharedKVQueryGradientShapeOf<64>::kSharedBytes;
    case 128: return SharedKVQueryGradientShapeOf<128>::kSharedBytes;
    case 256: return SharedKVQueryGradientShapeOf<256>::kSharedBytes;
    case 272: return SharedKVQueryGradientShapeOf<272>::kSharedBytes;
    case 336: return SharedKVQueryGradientShapeOf<336>::kSharedBytes;
  }
  return 0;
}

int shared_kv_bwd_dx_shared_bytes(int columns) {
  switch (columns) {
    case 64: return SharedKVTokenGradientShapeOf<64>::kSharedBytes;
    case 128: return SharedKVTokenGradientShapeOf<128>::kSharedBytes;
    case 256: return SharedKVTokenGradientShapeOf<256>::kSharedBytes;
    case 272: return SharedKVTokenGradientShapeOf<272>::kSharedBytes;
    case 336: return SharedKVTokenGradientShapeOf<336>::kSharedBytes;
  }
  return 0;
}

int attention_shared_bytes(int columns) {
  switch (columns) {
    case 64: return AttentionShapeOf<64>::kSharedBytes;
    case 128: return AttentionShapeOf<128>::kSharedBytes;
    case 256: return AttentionShapeOf<256>::kSharedBytes;
  }
  return 0;
}

int attention_long_shared_bytes(int columns) { return columns == 64 ? AttentionLongShapeOf<64>::kSharedBytes : 0; }

int attention_bwd_shared_bytes(int columns) {
  switch (columns) {
    case 64: return BackwardShapeOf<64>::kSharedBytes;
    case 128: return BackwardShapeOf<128>::kSharedBytes;
    case 256: return WideShape::kSharedBytes;
  }
  return 0;
}

}  // namespace perceiver
