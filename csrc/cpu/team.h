// A team of threads for one call: started with it, joined before it returns.
//
// Not a pool: nothing idles beside PyTorch's OpenMP threads, and a process that forks (data loaders) cannot inherit a
// pool whose threads are gone. Starting a thread costs about 20 us, a tile at least a hundred times that.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace dadpo {
namespace {

class Team {
public:
    // Runs body(team, rank) on `size` threads; the first exception is rethrown here.
    template <typename Body>
    static void run(int size, Body body) {
        Team team(size);
        auto guarded = [&](auto&& step) {
            try {
                step();
            } catch (...) {
                std::lock_guard<std::mutex> lock(team.mutex_);
                if (!team.error_) team.error_ = std::current_exception();
                team.failed_ = true;  // nobody waits at a barrier for a thread that will not come
            }
        };
        std::vector<std::thread> threads;
        guarded([&] {
            threads.reserve(size);
            for (int rank = 1; rank < size; rank++)
                threads.emplace_back([&, rank] { guarded([&] { body(team, rank); }); });
        });
        if (!team.failed_) guarded([&] { body(team, 0); });
        for (auto& thread : threads) thread.join();
        if (team.error_) std::rethrow_exception(team.error_);
    }

    // Every thread of the team waits here for the others.
    void barrier() {
        const int phase = phase_.load();
        if (arrived_.fetch_add(1) + 1 == size_) {
            arrived_ = 0;
            phase_ = phase + 1;
            return;
        }
        while (phase_.load() == phase && !failed_) std::this_thread::yield();
    }

    // This rank's share [begin, end) of `count` items, in whole multiples of `grain`: fixed, so results do not depend
    // on timing, and contiguous, so no item's arithmetic depends on the number of threads.
    std::pair<long, long> share(int rank, long count, long grain) const {
        const long grains = (count + grain - 1) / grain;
        auto edge = [&](int r) { return std::min(count, grains * r / size_ * grain); };
        return {edge(rank), edge(rank + 1)};
    }

private:
    explicit Team(int size) : size_(size) {}
    const int size_;
    std::atomic<int> arrived_{0}, phase_{0};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::exception_ptr error_;
};

}  // namespace
}  // namespace dadpo
