// Multiply-adds on registers alone, as many chains as a product of csrc/cpu has accumulators: see phases.py.
#include "../../csrc/cpu/gemm.h"

using namespace dadpo;

// Floating-point operations done; `sink` keeps them from being optimised away.
extern "C" double fma_steps(long steps, float* sink) {
    vf chains[kRows * kRowVectors];
    for (int i = 0; i < kRows * kRowVectors; i++) chains[i] = splat(sink[0] + i);
    const vf factor = splat(sink[0] + 0.999f), term = splat(sink[0] + 1e-6f);
    for (long step = 0; step < steps; step++)
#pragma GCC unroll 32
        for (vf& chain : chains) chain = chain * factor + term;
    vf sum{};
    for (const vf& chain : chains) sum += chain;
    sink[0] = horizontal_sum(sum);
    return 2.0 * kLanes * kRows * kRowVectors * steps;
}
