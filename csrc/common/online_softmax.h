// Online softmax state (running maximum and sum of exponentials relative to it) and its merge.
//
// Milakov & Gimelshein, arXiv 1805.02867. Shared by the CPU and CUDA kernels, so it depends on the C++ standard library
// only.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DADPO_HD __host__ __device__ __forceinline__
#else
#define DADPO_HD inline
#endif

namespace dadpo {

// The value subtracted before exp(): the maximum, or 0 for a row of -inf only, which avoids inf - inf.
DADPO_HD float reference(float max) { return max == -INFINITY ? 0.0f : max; }

template <typename Sum>
struct OnlineSoftmax {
    float max = -INFINITY;
    Sum sum = 0;

    // Adds columns whose maximum is `other_max` and whose exp(x - reference(other_max)) sum to `other_sum`.
    DADPO_HD void merge(float other_max, float other_sum) {
        const float merged = other_max > max ? other_max : max;
        sum = sum * static_cast<Sum>(expf(max - reference(merged))) +
              other_sum * expf(reference(other_max) - reference(merged));
        max = merged;
    }
};

}  // namespace dadpo
