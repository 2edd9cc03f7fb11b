// One row of channels in the registers of a group of lanes: two neighbouring channels per lane and step.
#pragma once

#include <cstdint>

namespace perceiver {

// kLanes lanes (a power of two <= 32) hold a row in kSteps steps of 2 * kLanes channels. The first kFullSteps
// lie inside every row that the shape is chosen for; only the later ones are checked against the row's end.
template <int kLanes_, int kFullSteps_, int kSteps_>
struct RowShape {
  static constexpr int kLanes = kLanes_;
  static constexpr int kFullSteps = kFullSteps_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kMinChannels = 2 * kLanes * kFullSteps;
  static constexpr int kMaxChannels = 2 * kLanes * kSteps;
};

// Lane l holds channels 2 * l + offset(step) and the one after it. `left` is the number of channels from
// channel 2 * l to the end of the row, so a channel at some offset exists when offset < left.
template <class Shape>
struct Row {
  float value[Shape::kSteps][2];

  __device__ __forceinline__ static constexpr int offset(int step) { return 2 * Shape::kLanes * step; }

  __device__ __forceinline__ static bool contains(int step, int half, int left) {
    return step < Shape::kFullSteps || offset(step) + half < left;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) value[step][0] = value[step][1] = 0.0f;
  }

  // value = read(offset) for the lane's channels of the row, 0 past its end.
  template <class Read>
  __device__ __forceinline__ void fill(int left, Read read) {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        value[step][half] = contains(step, half, left) ? read(offset(step) + half) : 0.0f;
      }
    }
  }

  // The sum over the lanes of the group, in every lane, in one fixed order.
  __device__ __forceinline__ static float group_sum(float partial) {
#pragma unroll
    for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2) {
      partial += __shfl_xor_sync(0xffffffffu, partial, distance);
    }
    return partial;
  }

  // Subtracts the mean, returns rstd = 1 / sqrt(variance + eps). Two passes: rows far from zero stay exact.
  // The mean is what a division would give: of rows of one value, which rstd multiplies by 1 / sqrt(eps), nothing is left.
  __device__ __forceinline__ float centre(int left, float channels, float inverse_channels, float eps) {
    float sum = value[0][0] + value[0][1];
#pragma unroll
    for (int step = 1; step < Shape::kSteps; ++step) sum += value[step][0] + value[step][1];
    sum = group_sum(sum);
    float mean = sum * inverse_channels;
    mean = fmaf(fmaf(-mean, channels, sum), inverse_channels, mean);
    float squares[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (contains(step, half, left)) value[step][half] -= mean;
        squares[half] = fmaf(value[step][half], value[step][half], squares[half]);
      }
    }
    return rsqrtf(group_sum(squares[0] + squares[1]) * inverse_channels + eps);
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int step = 0; step < Shape::kSteps; ++step) {
      value[step][0] *= factor;
      value[step][1] *= factor;
    }
  }
};

}  // namespace perceiver
