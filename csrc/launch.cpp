// The C interface: checks what a kernel would crash on, chooses the kernel, turns errors into sentences.

#include "perceiver/launch.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <string>

#include "kernels/pack_enqueue.h"
#include "perceiver/layout.h"

namespace perceiver {
namespace {

void succeed(PkStatus* status) {
  status->code = PK_OK;
  status->text[0] = '\0';
}

template <typename... Values>
void refuse(PkStatus* status, PkCode code, const char* format, Values... values) {
  status->code = code;
  std::snprintf(status->text, sizeof(status->text), format, values...);
}

void report_cuda(PkStatus* status, const char* function, cudaError_t error) {
  if (error == cudaSuccess) return succeed(status);
  // Error 35 says "driver version is insufficient" on a machine that has no driver at all.
  const char* meaning = error == cudaErrorInsufficientDriver
                            ? "no NVIDIA driver is loaded, or it is too old for this build"
                        : error == cudaErrorNoKernelImageForDevice
                            ? "this build holds no code for the GPU; see PERCEIVER_KERNELS_CUDA_ARCHS"
                            : cudaGetErrorString(error);
  refuse(status, PK_CUDA_ERROR, "%s: %s (%s, %d)", function, meaning, cudaGetErrorName(error),
         static_cast<int>(error));
}

bool is_element_type(int32_t type) {
  return type >= static_cast<int32_t>(ElementType::kFloat32) &&
         type <= static_cast<int32_t>(ElementType::kBFloat16);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The rule of PackForwardParams that is broken, or null. What users pass was checked in Python before.
const char* broken_rule(const PackForwardParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t channels = int64_t{p.content_channels} + p.position_channels;
  if (p.content_channels < 0 || p.position_channels < 0 || channels < 1 || channels > kMaxChannels) {
    return "content and positions must have 1 to 1024 channels together";
  }
  if (p.packed_channels < channels || p.packed_channels > kMaxChannels ||
      p.packed_channels % kChannelMultiple != 0) {
    return "packed_channels must be a multiple of 16 that holds the channels";
  }
  if (p.packed_channels - channels >= kChannelMultiple) {
    return "packed_channels must be the channels rounded up to 16";
  }
  if (!is_element_type(p.content_type) || !is_element_type(p.positions_type) ||
      !is_element_type(p.packed_type)) {
    return "element types must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  }
  if (p.batch < 0 || p.tokens < 0 || p.batch >= kLimit) {
    return "batch and tokens must not be negative, batch below 2^31";
  }
  if (p.batch == 0 || p.tokens == 0) return nullptr;
  if (p.rows_per_tile < 1 || p.blocks < 1) return "rows_per_tile and blocks must be positive";
  if (p.tokens / p.rows_per_tile >= kLimit - 1) return "tokens / rows_per_tile must be below 2^31";
  if ((p.content == nullptr && p.content_channels > 0) ||
      (p.positions == nullptr && p.position_channels > 0) || p.packed == nullptr ||
      (p.rstd == nullptr && p.normalize != 0)) {
    return "a pointer is null";
  }
  if (!is_aligned(p.packed)) return "packed must lie on 16 bytes";
  if (!p.flat) return nullptr;
  const int64_t element_bytes = p.content_type == static_cast<int32_t>(ElementType::kFloat32) ? 4 : 2;
  if (p.position_channels != 0 || p.stride_content_channel != 1 ||
      p.stride_content_token != p.content_channels) {
    return "a flat pack needs contiguous content and no positions";
  }
  if (!is_aligned(p.content) || (p.batch > 1 && p.stride_content_batch * element_bytes % 16 != 0) ||
      p.rows_per_tile * p.content_channels * element_bytes % 16 != 0) {
    return "a flat pack needs every tile to start on 16 bytes";
  }
  return nullptr;
}

cudaError_t enqueue_pack(const PackForwardParams& params) {
  if (!params.flat) return enqueue_pack_strided(params);
  switch (static_cast<ElementType>(params.content_type)) {
    case ElementType::kFloat32: return enqueue_pack_flat<ElementType::kFloat32>(params);
    case ElementType::kFloat16: return enqueue_pack_flat<ElementType::kFloat16>(params);
    case ElementType::kBFloat16: return enqueue_pack_flat<ElementType::kBFloat16>(params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace perceiver

int32_t pk_abi_version() noexcept { return PK_ABI_VERSION; }

const char* pk_layout() noexcept {
  static const std::string layout = perceiver::describe_layout<perceiver::PackForwardParams>();
  return layout.c_str();
}

void pk_pack_inputs_fwd(const perceiver::PackForwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  if (const char* rule = broken_rule(*params)) {
    return refuse(status, PK_INVALID_ARGUMENT, "pack_inputs_fwd: %s", rule);
  }
  if (params->batch == 0 || params->tokens == 0) return succeed(status);
  cudaError_t error = cudaSetDevice(params->device);
  if (error == cudaSuccess) error = enqueue_pack(*params);
  report_cuda(status, "pack_inputs_fwd", error);
}
