// The C interface: checks what a kernel would crash on, chooses the kernel, turns errors into sentences.

#include "perceiver/launch.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <string>

#include "kernels/attention_enqueue.h"
#include "kernels/pack_enqueue.h"
#include "kernels/shared_kv_enqueue.h"
#include "perceiver/layout.h"
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

bool is_element_type(int32_t type) {
  return type >= static_cast<int32_t>(ElementType::kFloat32) &&
         type <= static_cast<int32_t>(ElementType::kBFloat16);
}

bool is_half(int32_t type) {
  return type == static_cast<int32_t>(ElementType::kFloat16) || type == static_cast<int32_t>(ElementType::kBFloat16);
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

// The rule of SharedKVForwardParams that is broken, or null.
const char* broken_rule(const SharedKVForwardParams& p, const RowTensor& q, const RowTensor& x, int columns) {
  if (p.batch < 0 || p.rows < 0 || p.tokens < 0 || p.channels < 1) return "sizes must not be negative, channels positive";
  if (columns == 0) return "channels must be at most 336";
  if (!is_half(p.type)) return "type must be 1 (float16) or 2 (bfloat16)";
  if (p.z_out_type != p.type && p.z_out_type != static_cast<int32_t>(ElementType::kFloat32)) {
    return "z_out_type must be 0 (float32) or type";
  }
  if (p.channels % 8 != 0) return "channels must be a multiple of 8";
  if (p.splits < 1 || p.tokens_per_split < 1 || (p.splits > 1 && p.tokens_per_split % shared_kv_block_kv(columns) != 0)) {
    return "splits must be positive, and of whole tiles of tokens";
  }
  if (int64_t{p.splits} * p.tokens_per_split < p.tokens) return "the splits must cover the tokens";
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  if (int64_t{p.batch} * p.splits * ((int64_t{p.rows} + kSharedKVBlockQ - 1) / kSharedKVBlockQ) > kMostBlocks) {
    return "there must be fewer than 2^31 blocks";
  }
  if (!(p.scale_log2 > 0.0f)) return "scale_log2 must be positive";
  if (p.batch == 0 || p.rows == 0) return nullptr;
  if (p.tokens == 0) return "there must be tokens";
  if (p.q == nullptr || p.x == nullptr || p.z_out == nullptr || p.lse_out == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode(q) || !can_encode(x)) return "q and x must have a base and pitches of 16 bytes";
  return is_aligned(p.z_out) ? nullptr : "z_out must lie on 16 bytes";
}

// What both passes of attention ask of sizes; heads of `columns` channels.
template <class Params>
const char* broken_size(const Params& p, int columns, const char* widest) {
  if (p.batch < 0 || p.heads < 1 || p.queries < 0 || p.keys < 0 || p.channels_qk < 1 || p.channels_v < 1) {
    return "sizes must not be negative, heads and channels positive";
  }
  if (columns == 0) return widest;
  if (p.channels_qk % 8 != 0 || p.channels_v % 8 != 0) return "channels must be multiples of 8";
  if (p.heads_per_key_head < 1 || p.heads % p.heads_per_key_head != 0) return "heads_per_key_head must divide heads";
  return is_half(p.type) ? nullptr : "type must be 1 (float16) or 2 (bfloat16)";
}

// Whether rows of a gradient or result of heads start on 16 bytes.
bool rows_aligned(const void* data, int64_t batch, int64_t head, int64_t row) {
  return is_aligned(data) && batch % 8 == 0 && head % 8 == 0 && row % 8 == 0;
}

// The rule of AttentionForwardParams that is broken, or null.
const char* broken_rule(const AttentionForwardParams& p, const RowTensor& query, const RowTensor& key, const RowTensor& value,
                        int columns) {
  if (const char* rule = broken_size(p, columns, "channels must be at most 256")) return rule;
  if (p.out_type != p.type && p.out_type != static_cast<int32_t>(ElementType::kFloat32)) {
    return "out_type must be 0 (float32) or type";
  }
  if (p.splits < 1 || p.keys_per_split < 1 || (p.splits > 1 && p.keys_per_split % attention_block_kv(columns) != 0)) {
    return "splits must be positive, and of whole tiles of keys";
  }
  if (int64_t{p.splits} * p.keys_per_split < p.keys) return "the splits must cover the keys";
  const int64_t row_blocks = (int64_t{p.queries} + kAttentionBlockQ - 1) / kAttentionBlockQ;
  if (row_blocks * p.splits * p.heads * p.batch != p.items) return "items must be all blocks of rows of all splits, below 2^31";
  if (!(p.scale_log2 > 0.0f)) return "scale_log2 must be positive";
  if (p.items == 0) return nullptr;
  if (p.blocks < 1) return "blocks must be positive";
  if (p.keys == 0) return "there must be keys";
  if (p.query == nullptr || p.key == nullptr || p.value == nullptr || p.out == nullptr || p.lse_out == nullptr) {
    return "a pointer is null";
  }
  if (!can_encode(query) || !can_encode(key) || !can_encode(value)) {
    return "query, key and value must have a base and pitches of 16 bytes";
  }
  const bool aligned = rows_aligned(p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  return aligned && p.stride_out_split % 8 == 0 ? nullptr : "out must lie on 16 bytes, its rows too";
}

// The rule of AttentionBackwardParams that is broken, or null.
const char* broken_rule(const AttentionBackwardParams& p, std::initializer_list<RowTensor> tiled, int columns) {
  if (const char* rule = broken_size(p, columns, "channels must be at most 128")) return rule;
  if (p.splits < 1 || p.keys_per_split < 1 || (p.splits > 1 && p.keys_per_split % kAttentionBackwardBlockKV != 0)) {
    return "splits must be positive, and of whole tiles of keys";
  }
  if (int64_t{p.splits} * p.keys_per_split < p.keys || int64_t{p.splits - 1} * p.keys_per_split >= p.keys) {
    return "the splits must cover the keys, and none be empty";
  }
  const int block_q = attention_bwd_block_q(columns);
  if (p.query_blocks != (int64_t{p.queries} + block_q - 1) / block_q) return "query_blocks must cover the queries";
  if (int64_t{p.batch} * p.heads * p.query_blocks * 4 >= int64_t{1} << 31) return "there must be fewer than 2^29 blocks of queries";
  if (int64_t{p.batch} * (p.heads / p.heads_per_key_head) * p.splits != p.items) return "items must be all splits of all heads";
  if (!(p.scale > 0.0f) || !(p.scale_log2 > 0.0f)) return "scale and scale_log2 must be positive";
  if (p.items == 0 || p.queries == 0) return nullptr;
  if (p.blocks < 1) return "blocks must be positive";
  if (p.query == nullptr || p.key == nullptr || p.value == nullptr || p.out == nullptr || p.dout == nullptr ||
      p.lse == nullptr || p.rows == nullptr || p.dq_parts == nullptr || p.dq == nullptr || p.dk == nullptr || p.dv == nullptr) {
    return "a pointer is null";
  }
  for (const RowTensor& tensor : tiled) {
    if (!can_encode(tensor)) return "query, key, value, dout and gradients must have a base and pitches of 16 bytes";
  }
  const bool aligned = rows_aligned(p.out, p.stride_out_batch, p.stride_out_head, p.stride_out_row);
  return aligned && is_aligned(p.rows) && is_aligned(p.dq_parts) ? nullptr : "out and workspaces must lie on 16 bytes";
}

const char* broken_rule(const MergeStatesParams& p) {
  if (p.batch < 0 || p.splits < 0 || p.rows < 0 || p.channels < 4 || p.channels % 4 != 0) {
    return "sizes must not be negative, channels a positive multiple of 4";
  }
  if (!is_element_type(p.z_type)) return "z_type must be 0 (float32), 1 (float16) or 2 (bfloat16)";
  if (p.batch == 0 || p.rows == 0) return nullptr;
  if ((p.z_state == nullptr) != (p.lse_state == nullptr)) return "an earlier state is z_state and lse_state";
  if (p.heads < 1 || p.batch % p.heads != 0) return "heads must divide batch";
  if (p.z == nullptr || p.lse == nullptr ||
      (p.splits > 0 && (p.z_part == nullptr || p.lse_part == nullptr))) {
    return "a pointer is null";
  }
  if (!is_aligned(p.z) || !is_aligned(p.z_part) || !is_aligned(p.z_state)) return "z must lie on 16 bytes everywhere";
  return nullptr;
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
  }
  return cudaErrorInvalidValue;
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
  if (std::strcmp(kernel, "shared_kv_fwd") == 0) return perceiver::shared_kv_shared_bytes(columns);
  if (std::strcmp(kernel, "attention_fwd") == 0) return perceiver::attention_shared_bytes(columns);
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

void pk_shared_kv_fwd(const perceiver::SharedKVForwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto type = static_cast<ElementType>(params->type);
  const RowTensor q{params->q, type, params->batch, 1, params->rows, params->channels, params->stride_q_batch,
                    0,         params->stride_q_row};
  const RowTensor x{params->x, type, params->batch, 1, params->tokens, params->channels, params->stride_x_batch,
                    0,         params->stride_x_token};
  const int columns = columns_for(kSharedKVColumns, params->channels);
  if (const char* rule = broken_rule(*params, q, x, columns)) {
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

void pk_attention_fwd(const perceiver::AttentionForwardParams* params, PkStatus* status) noexcept {
  using namespace perceiver;
  const auto& p = *params;
  const auto [query, key, value] = attention_operands(p);
  const int columns = columns_for(kAttentionColumns, p.channels_qk > p.channels_v ? p.channels_qk : p.channels_v);
  if (const char* rule = broken_rule(p, query, key, value, columns)) {
    return refuse(status, PK_INVALID_ARGUMENT, "attention_fwd: %s", rule);
  }
  if (p.items == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(p.device);
  AttentionMaps maps;
  if (error == cudaSuccess) {
    const int block_kv = attention_block_kv(columns);
    const bool encoded = encode_tiles(&maps.query, query, 64, 64) && encode_tiles(&maps.key, key, block_kv, 64) &&
                         encode_tiles(&maps.value, value, block_kv, 64);
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
  if (p.items == 0 || p.queries == 0) return succeed(status);
#if PK_HOPPER
  cudaError_t error = cudaSetDevice(p.device);
  AttentionBackwardMaps maps;
  if (error == cudaSuccess) {
    const int block_q = attention_bwd_block_q(columns);
    const bool encoded = encode_tiles(&maps.query, query, block_q, 64) && encode_tiles(&maps.dout, dout, block_q, 64) &&
                         encode_tiles(&maps.key, key, kAttentionBackwardBlockKV, 64) &&
                         encode_tiles(&maps.value, value, kAttentionBackwardBlockKV, 64) &&
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
