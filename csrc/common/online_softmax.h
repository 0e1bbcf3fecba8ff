// The online softmax state (running maximum, sum of exponentials below it) and its merge.
//
// Milakov & Gimelshein, arXiv 1805.02867. Kept free of any library so that every kernel shares it.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DADPO_HD __host__ __device__ __forceinline__
#else
#define DADPO_HD inline
#endif

namespace dadpo {

// exp(x - reference(max)) never forms inf - inf: a row that has seen only -inf is measured from 0.
DADPO_HD float reference(float max) { return max == -INFINITY ? 0.0f : max; }

template <typename Sum>
struct OnlineSoftmax {
    float max = -INFINITY;
    Sum sum = 0;

    // Adds columns whose maximum is `other_max` and whose exponentials, taken from `reference(other_max)`, sum to
    // `other_sum`.
    DADPO_HD void merge(float other_max, float other_sum) {
        const float merged = other_max > max ? other_max : max;
        sum = sum * static_cast<Sum>(expf(max - reference(merged))) +
              other_sum * expf(reference(other_max) - reference(merged));
        max = merged;
    }
};

}  // namespace dadpo
