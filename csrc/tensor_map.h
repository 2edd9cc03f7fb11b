// Descriptions of tensors for the copy engine, made on the host.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "perceiver/params.h"

namespace perceiver {

// A [entries, heads, rows, columns] tensor of 16-bit elements, pitches in elements.
struct RowTensor {
  const void* data;
  ElementType type;
  int64_t entries, heads, rows, columns;
  int64_t entry_pitch, head_pitch, row_pitch;
};

// The map of tiles of one head of an entry, `rows` x `columns`, swizzled over as many bytes as a row of the tile has (32 or 128). False
// where there is no driver, or it refuses.
bool encode_tiles(CUtensorMap* map, const RowTensor& tensor, int rows, int columns);

// Whether tiles of the tensor can be described: 16-byte base and pitches.
bool can_encode(const RowTensor& tensor);

}  // namespace perceiver
