// Runs CUDA kernels on the host: found by `#include <cuda_runtime.h>` in place of NVIDIA's, so that g++ compiles the
// kernels' own source. A launch runs its blocks one after another, the threads of a block as fibers that take turns at
// every barrier and shuffle, or (DADPO_HOST_THREADS) as threads of the system, for the thread sanitizer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef DADPO_HOST_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time, so one instance serves them all

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#ifdef DADPO_HOST_THREADS
#define PER_THREAD thread_local
#else
#define PER_THREAD
#endif
inline PER_THREAD dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32;

#ifdef DADPO_HOST_THREADS
// Memory orders matter: __syncthreads orders memory; a shuffle only exchanges registers, and does not. Sleeps by futex,
// of which the thread sanitizer learns nothing.
class Barrier {
public:
    explicit Barrier(int size = 0) : size_(size) {}
    void wait(bool orders_memory) {
        const auto acquire = orders_memory ? std::memory_order_acquire : std::memory_order_relaxed;
        const auto both = orders_memory ? std::memory_order_acq_rel : std::memory_order_relaxed;
        const int phase = phase_.load(acquire);
        if (arrived_.fetch_add(1, both) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.fetch_add(1, both);
            syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, size_, nullptr, nullptr, 0);
        } else {
            while (phase_.load(acquire) == phase)
                syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
        }
    }

private:
    int size_;
    std::atomic<int> arrived_{0}, phase_{0};
};
using Slot = std::atomic<uint32_t>;
inline void put(Slot& slot, uint32_t bits) { slot.store(bits, std::memory_order_relaxed); }
inline uint32_t get(const Slot& slot) { return slot.load(std::memory_order_relaxed); }
#else
class Barrier {
public:
    explicit Barrier(int size = 0) : size_(size) {}
    void wait(bool);

private:
    int size_, arrived_ = 0, phase_ = 0;
};
using Slot = uint32_t;
inline void put(Slot& slot, uint32_t bits) { slot = bits; }
inline uint32_t get(const Slot& slot) { return slot; }
#endif

struct Warp {
    Barrier barrier{kWarp};
    Slot slots[2][kWarp] = {};
};

struct Block {
    explicit Block(int threads) : barrier(threads), warps(new Warp[threads / kWarp]) {}
    Barrier barrier;
    std::unique_ptr<Warp[]> warps;
};

struct Thread {
    dim3 index;
    Block* block;
    int parity = 0;  // of its shuffles: two in a row use different slots, so one barrier each is enough
    Warp& warp() const { return block->warps[index.x / kWarp]; }
};
inline PER_THREAD Thread* current = nullptr;

inline void be(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
}

#ifndef DADPO_HOST_THREADS
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 * 1024);
    Thread thread;
    bool finished = false;
};

// The fibers of the running block; they take turns in order.
struct Scheduler {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::function<void()> body;
    ucontext_t main;
    size_t running = 0, count = 0, left = 0;
    size_t idle = 0;  // turns since anything happened

    void to_next() {
        Fiber& from = *fibers[running];
        do running = (running + 1) % count;
        while (fibers[running]->finished);
        be(fibers[running]->thread);
        if (fibers[running].get() != &from) swapcontext(&from.context, &fibers[running]->context);
    }
    static void enter();
};
inline Scheduler scheduler;

inline void Scheduler::enter() {
    scheduler.body();
    scheduler.idle = 0;
    scheduler.fibers[scheduler.running]->finished = true;
    if (--scheduler.left) scheduler.to_next();
    setcontext(&scheduler.main);
}

inline void Barrier::wait(bool) {
    scheduler.idle = 0;
    const int phase = phase_;
    if (++arrived_ == size_) {
        arrived_ = 0;
        phase_++;
        return;
    }
    while (phase_ == phase) {
        if (++scheduler.idle > 2 * scheduler.count) {
            fprintf(stderr, "cuda_host: deadlock, not every thread arrives at a barrier\n");
            abort();
        }
        scheduler.to_next();
    }
}
#endif

inline void run_block(Block& block, dim3 index, dim3 grid, dim3 threads, const std::function<void()>& body) {
    const unsigned count = threads.x;
    auto place = [=] { blockIdx = index, gridDim = grid, blockDim = threads; };
#ifdef DADPO_HOST_THREADS
    std::vector<std::thread> team;
    for (unsigned i = 0; i < count; i++)
        team.emplace_back([&, i] {
            Thread self{dim3(i, 0, 0), &block};
            be(self);
            place();
            body();
        });
    for (auto& thread : team) thread.join();
#else
    Scheduler& s = scheduler;
    while (s.fibers.size() < count) s.fibers.push_back(std::make_unique<Fiber>());
    s.body = body;
    s.count = s.left = count;
    s.running = s.idle = 0;
    for (unsigned i = 0; i < count; i++) {
        Fiber& f = *s.fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, Scheduler::enter, 0);
        f.thread = Thread{dim3(i, 0, 0), &block};
        f.finished = false;
    }
    place();
    be(s.fibers[0]->thread);
    swapcontext(&s.main, &s.fibers[0]->context);
#endif
}

// This thread's value in the warp's slots; what `from` has put there, or its own where there is no such lane.
template <typename T>
T shuffle(T value, unsigned from) {
    static_assert(sizeof(T) == 4, "32-bit shuffles only");
    Warp& warp = current->warp();
    Slot* slots = warp.slots[current->parity ^= 1];
    uint32_t bits;
    memcpy(&bits, &value, 4);
    put(slots[threadIdx.x % kWarp], bits);
    warp.barrier.wait(false);
    if (from < kWarp) bits = get(slots[from]);
    memcpy(&value, &bits, 4);
    return value;
}

inline unsigned lane() { return threadIdx.x % kWarp; }

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::current->block->barrier.wait(true); }
inline void __syncwarp(unsigned = 0) { cuda_host::current->warp().barrier.wait(true); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_host::shuffle(value, cuda_host::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
    return cuda_host::shuffle(value, cuda_host::lane() - delta);  // below lane 0: its own value
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
    for (int mask = 16; mask; mask /= 2) value += cuda_host::shuffle(value, cuda_host::lane() ^ mask);
    return value;
}

inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The part of the runtime that launches need.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
    const dim3 grid = config->gridDim, threads = config->blockDim;
    if (!grid.x || grid.x > 0x7fffffff || !grid.y || grid.y > 65535 || threads.x % cuda_host::kWarp)
        return cudaErrorInvalidConfiguration;
    const std::function<void()> body = [&] { kernel(args...); };
    for (unsigned y = 0; y < grid.y; y++)
        for (unsigned x = 0; x < grid.x; x++) {
            cuda_host::Block block(threads.x);
            cuda_host::run_block(block, dim3(x, y), grid, threads, body);
        }
    return cudaSuccess;
}
