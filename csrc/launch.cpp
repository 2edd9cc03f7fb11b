// The C interface: asks rules.h, chooses the kernel, turns errors into sentences.

#include "perceiver/launch.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "kernels/attention_enqueue.h"
#include "kernels/pack_enqueue.h"
#include "kernels/shared_kv_enqueue.h"
#include "perceiver/layout.h"
#include "rules.h"
#include "tensor_map.h"

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
  // What a call returned is the thread's last error too, and the next launch would report it again.
  static_cast<void>(cudaGetLastError());
  // Error 35 says "driver version is insufficient" on a machine that has no driver at all.
  const char* meaning = error == cudaErrorInsufficientDriver
                            ? "no NVIDIA driver is loaded, or it is too old for this build"
                        : error == cudaErrorNoKernelImageForDevice
                            ? "this build holds no code for the GPU; see PERCEIVER_KERNELS_CUDA_ARCHS"
                            : cudaGetErrorString(error);
  refuse(status, PK_CUDA_ERROR, "%s: %s (%s, %d)", function, meaning, cudaGetErrorName(error),
         static_cast<int>(error));
}

constexpr char kNoHopper[] = "%s: this build holds no kernels for Hopper; see PERCEIVER_KERNELS_CUDA_ARCHS";
constexpr char kNoMaps[] = "%s: the driver describes no tensors to the copy engine (TMA)";

cudaError_t enqueue_pack(const PackForwardParams& params) {
  if (!params.flat) return enqueue_pack_strided(params);
  switch (static_cast<ElementType>(params.content_type)) {
    case ElementType::kFloat32: return enqueue_pack_flat<ElementType::kFloat32>(params);
    case ElementType::kFloat16: return enqueue_pack_flat<ElementType::kFloat16>(params);
    case ElementType::kBFloat16: return enqueue_pack_flat<ElementType::kBFloat16>(params);
  }
  return cudaErrorInvalidValue;
}

#if PK_HOPPER
template <int kColumns>
cudaError_t enqueue_shared_kv(const SharedKVMaps& maps, const SharedKVForwardParams& params) {
  return params.type == static_cast<int32_t>(ElementType::kFloat16)
             ? enqueue_shared_kv_fwd<ElementType::kFloat16, kColumns>(maps, params)
             : enqueue_shared_kv_fwd<ElementType::kBFloat16, kColumns>(maps, params);
}

cudaError_t enqueue_shared_kv(int columns, const SharedKVMaps& maps, const SharedKVForwardParams& params) {
  switch (columns) {
    case 64: return enqueue_shared_kv<64>(maps, params);
    case 128: return enqueue_shared_kv<128>(maps, params);
    case 256: return enqueue_shared_kv<256>(maps, params);
    case 272: return enqueue_shared_kv<272>(maps, params);
    case 336: return enqueue_shared_kv<336>(maps, params);
    case 512: return enqueue_shared_kv<512>(maps, params);
  }
  return cudaErrorInvalidValue;
}

template <int kColumns>
cudaError_t enqueue_shared_kv_dq(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  return params.type == static_cast<int32_t>(ElementType::kFloat16)
             ? enqueue_shared_kv_bwd_dq<ElementType::kFloat16, kColumns>(maps, params)
             : enqueue_shared_kv_bwd_dq<ElementType::kBFloat16, kColumns>(maps, params);
}

cudaError_t enqueue_shared_kv_dq(int columns, const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  switch (columns) {
    case 64: return enqueue_shared_kv_dq<64>(maps, params);
    case 128: return enqueue_shared_kv_dq<128>(maps, params);
    case 256: return enqueue_shared_kv_dq<256>(maps, params);
    case 272: return enqueue_shared_kv_dq<272>(maps, params);
    case 336: return enqueue_shared_kv_dq<336>(maps, params);
  }
  return cudaErrorInvalidValue;
}

template <int kColumns>
cudaError_t enqueue_shared_kv_dx(const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  return params.type == static_cast<int32_t>(ElementType::kFloat16)
             ? enqueue_shared_kv_bwd_dx<ElementType::kFloat16, kColumns>(maps, params)
             : enqueue_shared_kv_bwd_dx<ElementType::kBFloat16, kColumns>(maps, params);
}

cudaError_t enqueue_shared_kv_dx(int columns, const SharedKVBackwardMaps& maps, const SharedKVBackwardParams& params) {
  switch (columns) {
    case 64: return enqueue_shared_kv_dx<64>(maps, params);
    case 128: return enqueue_shared_kv_dx<128>(maps, params);
    case 256: return enqueue_shared_kv_dx<256>(maps, params);
    case 272: return enqueue_shared_kv_dx<272>(maps, params);
    case 336: return enqueue_shared_kv_dx<336>(maps, params);
  }
  return cudaErrorInvalidValue;
}

// Maps of rows and tokens in tiles of a kernel; those of the tails are for widths of 16 modulo 64.
bool encode_shared_kv(SharedKVBackwardMaps& maps, const RowTensor& q, const RowTensor& dz, const RowTensor& x, int block_q,
                      int block_kv) {
  return encode_tiles(&maps.query, q, block_q, 64) && encode_tiles(&maps.query_tail, q, block_q, 16) &&
         encode_tiles(&maps.dz, dz, block_q, 64) && encode_tiles(&maps.dz_tail, dz, block_q, 16) &&
         encode_tiles(&maps.tokens, x, block_kv, 64) && encode_tiles(&maps.tokens_tail, x, block_kv, 16);
}

template <int kColumns>
cudaError_t enqueue_attention(const AttentionMaps& maps, const AttentionForwardParams& params) {
  return params.type == static_cast<int32_t>(ElementType::kFloat16)
             ? enqueue_attention_fwd<ElementType::kFloat16, kColumns>(maps, params)
             : enqueue_attention_fwd<ElementType::kBFloat16, kColumns>(maps, params);
}

cudaError_t enqueue_attention(int columns, const AttentionMaps& maps, const AttentionForwardParams& params) {
  switch (columns) {
    case 64: return enqueue_attention<64>(maps, params);
    case 128: return enqueue_attention<128>(maps, params);
    case 256: return enqueue_attention<256>(maps, params);
  }
  return cudaErrorInvalidValue;
}

template <int kColumns>
cudaError_t enqueue_attention_backward(const AttentionBackwardMaps& maps, const AttentionBackwardParams& params) {
  return params.type == static_cast<int32_t>(ElementType::kFloat16)
             ? enqueue_attention_bwd<ElementType::kFloat16, kColumns>(maps, params)
             : enqueue_attention_bwd<ElementType::kBFloat16, kColumns>(maps, params);
}

cudaError_t enqueue_attention_backward(int columns, const AttentionBackwardMaps& maps, const AttentionBackwardParams& params) {
  switch (columns) {
    case 64: return enqueue_attention_backward<64>(maps, params);
    case 128: return enqueue_attention_backward<128>(maps, params);
    case 256:
      return params.type == static_cast<int32_t>(ElementType::kFloat16)
                 ? enqueue_attention_bwd_wide<ElementType::kFloat16>(maps, params)
                 : enqueue_attention_bwd_wide<ElementType::kBFloat16>(maps, params);
  }
  return cudaErrorInvalidValue;
}
#endif

// The narrowest of the widths that holds the channels; 0 where none does.
template <int kCount>
int columns_for(const int (&widths)[kCount], int channels) {
  for (const int columns : widths) {
    if (channels <= columns) return columns;
  }
  return 0;
}

struct SharedKVOperands {
  RowTensor q, x;
};

template <class Params>
SharedKVOperands shared_kv_operands(const Params& p) {
  const auto type = static_cast<ElementType>(p.type);
  return {{p.q, type, p.batch, 1, p.rows, p.channels, p.stride_q_batch, 0, p.stride_q_row},
          {p.x, type, p.batch, 1, p.tokens, p.channels, p.stride_x_batch, 0, p.stride_x_token}};
}

struct AttentionOperands {
  RowTensor query, key, value;
};

template <class Params>
AttentionOperands attention_operands(const Params& p) {
  const auto type = static_cast<ElementType>(p.type);
  const int key_heads = p.heads_per_key_head > 0 ? p.heads / p.heads_per_key_head : 0;
  return {{p.query, type, p.batch, p.heads, p.queries, p.channels_qk, p.stride_query_batch, p.stride_query_head,
           p.stride_query_row},
          {p.key, type, p.batch, key_heads, p.keys, p.channels_qk, p.stride_key_batch, p.stride_key_head, p.stride_key_row},
          {p.value, type, p.batch, key_heads, p.keys, p.channels_v, p.stride_value_batch, p.stride_value_head,
           p.stride_value_row}};
}

}  // namespace
}  // namespace perceiver

int32_t pk_abi_version() noexcept { return PK_ABI_VERSION; }

const char* pk_layout() noexcept {
  static const std::string layout = perceiver::describe_layouts();
  return layout.c_str();
}

int32_t pk_shared_bytes(const char* kernel, int32_t columns) noexcept {
#if PK_HOPPER
  if (std::strcmp(kernel, "shared_kv_fwd") == 0 || std::strcmp(kernel, "shared_kv_fwd_wide") == 0) {
    return perceiver::shared_kv_shared_bytes(columns);
  }
  if (std::strcmp(kernel, "shared_kv_bwd_dq") == 0) return perceiver::shared_kv_bwd_dq_shared_bytes(columns);
  if (std::strcmp(kernel, "shared_kv_bwd_dx") == 0) return perceiver::shared_kv_bwd_dx_shared_bytes(columns);
  if (std::strcmp(kernel, "attention_fwd") == 0) return perceiver::attention_shared_bytes(columns);
  if (std::strcmp(kernel, "attention_fwd_long") == 0) return perceiver::attention_long_shared_bytes(columns);
  if (std::strcmp(kernel, "attention_bwd") == 0) return perceiver::attention_bwd_shared_bytes(columns);
#endif
  return 0;
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

void pk_pack_inputs_bwd(const perceiver::PackBackwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  if (const char* rule = broken_rule(*params)) return refuse(status, PK_INVALID_ARGUMENT, "pack_inputs_bwd: %s", rule);
  if (params->rows == 0 || params->content_channels == 0) return succeed(status);
  cudaError_t error = cudaSetDevice(params->device);
  if (error == cudaSuccess) error = enqueue_pack_backward(*params);
  report_cuda(status, "pack_inputs_bwd", error);
}

void pk_shared_kv_fwd(const perceiver::SharedKVForwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto [q, x] = shared_kv_operands(*params);
  const int columns = columns_for(kSharedKVColumns, params->channels);
  if (const char* rule = broken_rule(*params, {q, x}, columns)) {
    return refuse(status, PK_INVALID_ARGUMENT, "shared_kv_fwd: %s", rule);
  }
  if (params->batch == 0 || params->rows == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(params->device);
  SharedKVMaps maps;
  if (error == cudaSuccess) {
    const bool encoded = encode_tiles(&maps.query, q, 64, 64) && encode_tiles(&maps.query_tail, q, 64, 16) &&
                         encode_tiles(&maps.tokens, x, shared_kv_block_kv(columns), 64);
    if (!encoded) {
      return refuse(status, PK_CUDA_ERROR, kNoMaps, "shared_kv_fwd");
    }
    error = enqueue_shared_kv(columns, maps, *params);
  }
  report_cuda(status, "shared_kv_fwd", error);
#else
  refuse(status, PK_INVALID_ARGUMENT, kNoHopper, "shared_kv_fwd");
#endif
}

void pk_shared_kv_bwd(const perceiver::SharedKVBackwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto& p = *params;
  const auto [q, x] = shared_kv_operands(p);
  const RowTensor dz{p.dz, q.type, p.batch, 1, p.rows, p.channels, p.stride_dz_batch, 0, p.stride_dz_row};
  const int columns = columns_for(kSharedKVGradientColumns, p.channels);
  if (const char* rule = broken_rule(p, {q, dz, x}, columns)) {
    return refuse(status, PK_INVALID_ARGUMENT, "shared_kv_bwd: %s", rule);
  }
  if (p.batch == 0 || p.rows == 0 || p.tokens == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(p.device);
  SharedKVBackwardMaps maps;
  if (error == cudaSuccess && p.dq_out != nullptr) {
    if (!encode_shared_kv(maps, q, dz, x, 64, shared_kv_dq_block_kv(columns))) {
      return refuse(status, PK_CUDA_ERROR, kNoMaps, "shared_kv_bwd");
    }
    error = enqueue_shared_kv_dq(columns, maps, p);
  }
  if (error == cudaSuccess && p.dx != nullptr) {
    if (!encode_shared_kv(maps, q, dz, x, shared_kv_dx_block_q(columns), 64)) {
      return refuse(status, PK_CUDA_ERROR, kNoMaps, "shared_kv_bwd");
    }
    error = enqueue_shared_kv_dx(columns, maps, p);
  }
  report_cuda(status, "shared_kv_bwd", error);
#else
  refuse(status, PK_INVALID_ARGUMENT, kNoHopper, "shared_kv_bwd");
#endif
}

void pk_row_products(const perceiver::RowProductsParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  if (const char* rule = broken_rule(*params)) return refuse(status, PK_INVALID_ARGUMENT, "row_products: %s", rule);
  if (params->batch == 0 || params->rows == 0) return succeed(status);
  cudaError_t error = cudaSetDevice(params->device);
  if (error == cudaSuccess) error = enqueue_row_products(*params);
  report_cuda(status, "row_products", error);
}

void pk_attention_fwd(const perceiver::AttentionForwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto& p = *params;
  const auto [query, key, value] = attention_operands(p);
  const int columns = columns_for(kAttentionColumns, p.channels_qk > p.channels_v ? p.channels_qk : p.channels_v);
  if (const char* rule = broken_rule(p, {query, key, value}, columns)) {
    return refuse(status, PK_INVALID_ARGUMENT, "attention_fwd: %s", rule);
  }
  if (p.items == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(p.device);
  AttentionMaps maps;
  if (error == cudaSuccess) {
    const bool encoded = encode_tiles(&maps.query, query, 64, 64) && encode_tiles(&maps.key, key, p.block_kv, 64) &&
                         encode_tiles(&maps.value, value, p.block_kv, 64);
    if (!encoded) return refuse(status, PK_CUDA_ERROR, kNoMaps, "attention_fwd");
    error = enqueue_attention(columns, maps, p);
  }
  report_cuda(status, "attention_fwd", error);
#else
  refuse(status, PK_INVALID_ARGUMENT, kNoHopper, "attention_fwd");
#endif
}

void pk_attention_bwd(const perceiver::AttentionBackwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto& p = *params;
  const auto [query, key, value] = attention_operands(p);
  const RowTensor dout{p.dout, query.type, p.batch, p.heads, p.queries, p.channels_v, p.stride_dout_batch, p.stride_dout_head,
                       p.stride_dout_row};
  const RowTensor dq{p.dq, query.type, p.batch, p.heads, p.queries, p.channels_qk, p.stride_dq_batch, p.stride_dq_head,
                     p.stride_dq_row};
  const RowTensor dk{p.dk, key.type, key.entries, key.heads, p.keys, p.channels_qk, p.stride_dk_batch, p.stride_dk_head,
                     p.stride_dk_row};
  const RowTensor dv{p.dv, key.type, key.entries, key.heads, p.keys, p.channels_v, p.stride_dv_batch, p.stride_dv_head,
                     p.stride_dv_row};
  const int columns = columns_for(kAttentionBackwardColumns, p.channels_qk > p.channels_v ? p.channels_qk : p.channels_v);
  if (const char* rule = broken_rule(p, {query, key, value, dout, dq, dk, dv}, columns)) {
    return refuse(status, PK_INVALID_ARGUMENT, "attention_bwd: %s", rule);
  }
  if (p.batch == 0 || p.queries == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(p.device);
  AttentionBackwardMaps maps;
  if (error == cudaSuccess) {
    const int block_q = columns > 128 ? 64 : attention_bwd_block_q(columns);
    const int block_kv = columns > 128 ? kAttentionWideBlockKV : kAttentionBackwardBlockKV;
    const bool encoded = encode_tiles(&maps.query, query, block_q, 64) && encode_tiles(&maps.dout, dout, block_q, 64) &&
                         encode_tiles(&maps.key, key, block_kv, 64) && encode_tiles(&maps.value, value, block_kv, 64) &&
                         encode_tiles(&maps.dq, dq, 64, 64) && encode_tiles(&maps.dk, dk, 64, 64) &&
                         encode_tiles(&maps.dv, dv, 64, 64);
    if (!encoded) return refuse(status, PK_CUDA_ERROR, kNoMaps, "attention_bwd");
    error = enqueue_attention_backward(columns, maps, p);
  }
  report_cuda(status, "attention_bwd", error);
#else
  refuse(status, PK_INVALID_ARGUMENT, kNoHopper, "attention_bwd");
#endif
}

void pk_merge_states(const perceiver::MergeStatesParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  if (const char* rule = broken_rule(*params)) return refuse(status, PK_INVALID_ARGUMENT, "merge_states: %s", rule);
  if (params->batch == 0 || params->rows == 0) return succeed(status);
  cudaError_t error = cudaSetDevice(params->device);
  if (error == cudaSuccess) error = enqueue_merge_states(*params);
  report_cuda(status, "merge_states", error);
}
