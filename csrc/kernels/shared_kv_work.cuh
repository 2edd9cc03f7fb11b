// A block's share of the work of shared-KV attention: blocks of rows, fastest, splits of the tokens, batch entries.
#pragma once

#include "kernels/shared_kv_enqueue.h"

namespace perceiver {

struct SharedKVWork {
  int row, split, entry, token_begin, token_end, tiles;

  template <class Shape, class Params>
  __device__ static SharedKVWork of(const Params& params) {
    const int row_blocks = (params.rows + Shape::kBlockQ - 1) / Shape::kBlockQ;
    SharedKVWork work;
    work.row = static_cast<int>(blockIdx.x) % row_blocks * Shape::kBlockQ;
    const int rest = static_cast<int>(blockIdx.x) / row_blocks;
    work.split = rest % params.splits;
    work.entry = rest / params.splits;
    work.token_begin = work.split * params.tokens_per_split;
    work.token_end = min(work.token_begin + params.tokens_per_split, params.tokens);
    if (params.lengths != nullptr) work.token_end = min(work.token_end, params.lengths[work.entry]);
    work.tiles = max(0, (work.token_end - work.token_begin + Shape::kBlockKV - 1) / Shape::kBlockKV);
    return work;
  }
};

}  // namespace perceiver
