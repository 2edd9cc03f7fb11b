// The C interface of libperceiver_kernels.so: nothing throws across it; what can fail fills a PkStatus.
#pragma once

#include <cstddef>
#include <cstdint>

#include "perceiver/params.h"

// Raised whenever a struct or a function of this interface changes.
#define PK_ABI_VERSION 6

#define PK_API extern "C" __attribute__((visibility("default")))

enum PkCode : int32_t { PK_OK = 0, PK_INVALID_ARGUMENT = 1, PK_CUDA_ERROR = 2 };

struct PkStatus {
  int32_t code;
  // A sentence; empty when code is PK_OK.
  char text[252];
};

PK_API int32_t pk_abi_version() noexcept;

// The layout of the parameter structs as this library was compiled with them (perceiver/layout.h).
PK_API const char* pk_layout() noexcept;

// Shared memory of a block of a kernel for Hopper ("shared_kv_fwd", "shared_kv_bwd_dq", "shared_kv_bwd_dx", "attention_fwd",
// "attention_fwd_long", "attention_bwd") for rows of up to `columns`; 0: not built.
PK_API int32_t pk_shared_bytes(const char* kernel, int32_t columns) noexcept;

// Enqueues the pack of one [batch, tokens] array on params->stream; returns without waiting.
PK_API void pk_pack_inputs_fwd(const perceiver::PackForwardParams* params, PkStatus* status) noexcept;

// Enqueues the gradient of what was packed.
PK_API void pk_pack_inputs_bwd(const perceiver::PackBackwardParams* params, PkStatus* status) noexcept;

// Enqueues the shared-KV attention forward of 16-bit rows of up to 512 channels, on compute capability 9.0.
PK_API void pk_shared_kv_fwd(const perceiver::SharedKVForwardParams* params, PkStatus* status) noexcept;

// Enqueues the gradients of shared-KV attention that are not null, of 16-bit rows of up to 336 channels, on compute capability
// 9.0.
PK_API void pk_shared_kv_bwd(const perceiver::SharedKVBackwardParams* params, PkStatus* status) noexcept;

// Enqueues the row products that those start from.
PK_API void pk_row_products(const perceiver::RowProductsParams* params, PkStatus* status) noexcept;

// Enqueues the attention forward of 16-bit heads of up to 256 channels, on compute capability 9.0.
PK_API void pk_attention_fwd(const perceiver::AttentionForwardParams* params, PkStatus* status) noexcept;

// Enqueues the attention backward of 16-bit heads of up to 256 channels, on compute capability 9.0.
PK_API void pk_attention_bwd(const perceiver::AttentionBackwardParams* params, PkStatus* status) noexcept;

// Enqueues the merge of softmax states, or sums of parts.
PK_API void pk_merge_states(const perceiver::MergeStatesParams* params, PkStatus* status) noexcept;
