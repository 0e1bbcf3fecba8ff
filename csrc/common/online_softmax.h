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

    // Adds a block whose maximum is `block_max` and whose exponentials, taken from `reference(max(max, block_max))`,
    // sum to `block_sum`.
    DADPO_HD void absorb(float block_max, Sum block_sum) {
        const float merged = block_max > max ? block_max : max;
        sum = sum * static_cast<Sum>(expf(max - reference(merged))) + block_sum;
        max = merged;
    }

    DADPO_HD float lse() const { return sum > 0 ? max + logf(static_cast<float>(sum)) : (sum == 0 ? -INFINITY : sum); }
};

}  // namespace dadpo
