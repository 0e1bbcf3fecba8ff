// Runs parallel regions on the OpenMP runtime that PyTorch has loaded, if it has GNU's entry points. They are looked up
// at run time; nothing is linked.
//
// The runtime's threads spin for milliseconds after each PyTorch operation. Separate threads would compete with them
// for the cores, whereas a parallel region uses them. (As with PyTorch's own operations, a forked process must set the
// number of threads to 1 first: the worker threads do not survive a fork.)
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace dadpo {
namespace {

class OpenMP {
public:
    static bool available() { return runtime().usable(); }

    // Runs member(rank) on `size` threads concurrently and returns true. If it cannot, it runs nothing and returns
    // false.
    template <typename Member>
    static bool run(int size, Member& member) {
        if (!available()) return false;
        Call<Member> call{runtime(), size, member};
        runtime().parallel_(&Call<Member>::enter, &call, size, 0);
        return call.complete;
    }

private:
    static const OpenMP& runtime() {
        static const OpenMP loaded;
        return loaded;
    }

    template <typename Member>
    struct Call {
        const OpenMP& runtime;
        const int size;
        Member& member;
        bool complete = false;

        static void enter(void* data) {
            Call& call = *static_cast<Call*>(data);
            if (call.runtime.threads_() != call.size) return;  // limited by the user, or nested
            const int rank = call.runtime.thread_();
            if (rank == 0) call.complete = true;
            call.member(rank);
        }
    };

#if defined(__linux__)
    OpenMP() {
        void* pytorch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        if (!pytorch || !dlsym(pytorch, "GOMP_parallel")) return;
        // In the order in which PyTorch's own calls resolve: another runtime may be preloaded.
        auto find = [&](const char* name) {
            void* global = dlsym(RTLD_DEFAULT, name);
            return global ? global : dlsym(pytorch, name);
        };
        parallel_ = reinterpret_cast<Parallel>(find("GOMP_parallel"));
        thread_ = reinterpret_cast<Count>(find("omp_get_thread_num"));
        threads_ = reinterpret_cast<Count>(find("omp_get_num_threads"));
    }
#endif
    bool usable() const { return parallel_ && thread_ && threads_; }

    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Count = int (*)();
    Parallel parallel_ = nullptr;
    Count thread_ = nullptr, threads_ = nullptr;
};

}  // namespace
}  // namespace dadpo
