// The OpenMP runtime that PyTorch has loaded, if it is one with GNU's entry points; nothing is linked.
//
// Its threads spin for milliseconds after each of PyTorch's operations, waiting for the next. Threads of our own would
// share the cores with them; a region of the same runtime is what they wait for. (As for PyTorch's own operations, a forked
// process must set one thread first: it has none of the others.)
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace dadpo {
namespace {

class OpenMP {
public:
    static bool available() { return runtime().usable(); }

    // Runs member(rank) on `size` threads at once, or not at all and returns false.
    template <typename Member>
    static bool run(int size, Member& member) {
        if (!available()) return false;
        Call<Member> call{runtime(), size, member};
        runtime().parallel_(&Call<Member>::enter, &call, size, 0);
        return call.complete;
    }

private:
    static const OpenMP& runtime() {
        static const OpenMP found;
        return found;
    }

    template <typename Member>
    struct Call {
        const OpenMP& runtime;
        const int size;
        Member& member;
        bool complete = false;

        static void enter(void* data) {
            Call& call = *static_cast<Call*>(data);
            if (call.runtime.threads_() != call.size) return;  // a limit of the user's, or a region around this one
            const int rank = call.runtime.thread_();
            if (rank == 0) call.complete = true;
            call.member(rank);
        }
    };

#if defined(__linux__)
    OpenMP() {
        void* pytorch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        if (!pytorch || !dlsym(pytorch, "GOMP_parallel")) return;
        auto find = [&](const char* name) {  // in the order of PyTorch's own calls: another runtime may be preloaded
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
