// Fork-join parallelism: a team of threads runs one function and ends before the call returns.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "openmp.h"

namespace dadpo {
namespace {

class Team {
public:
    // Runs body(team, rank) on `size` threads; the first exception is rethrown here.
    template <typename Body>
    static void run(int size, Body body) {
        Team team(size);
        auto member = [&](int rank) {
            team.guard([&] { body(team, rank); });
        };
        if (size == 1) member(0);
        else if (!OpenMP::run(size, member)) team.guard([&] { team.start(member); });
        if (team.error_) std::rethrow_exception(team.error_);
    }

    // Blocks until all threads of the team have arrived.
    void barrier() {
        const int phase = phase_.load();
        if (arrived_.fetch_add(1) + 1 == size_) {
            arrived_ = 0;
            phase_ = phase + 1;
            return;
        }
        while (phase_.load() == phase && !failed_) std::this_thread::yield();
    }

    // This rank's share [begin, end) of `count` items, in multiples of `grain`. It is fixed and contiguous:
    // results depend neither on timing nor on the number of threads.
    std::pair<long, long> share(int rank, long count, long grain) const {
        const long grains = (count + grain - 1) / grain;
        auto edge = [&](int r) { return std::min(count, grains * r / size_ * grain); };
        return {edge(rank), edge(rank + 1)};
    }

private:
    explicit Team(int size) : size_(size) {}

    template <typename Step>
    void guard(Step step) {
        try {
            step();
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
            failed_ = true;  // releases the threads that wait at a barrier
        }
    }

    // Without OpenMP: starts new threads and joins them, about 20 us each.
    template <typename Member>
    void start(Member member) {
        std::vector<std::thread> threads;
        threads.reserve(size_);
        guard([&] {
            for (int rank = 1; rank < size_; rank++) threads.emplace_back(member, rank);
        });
        if (!failed_) member(0);
        for (auto& thread : threads) thread.join();
    }

    const int size_;
    std::atomic<int> arrived_{0}, phase_{0};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::exception_ptr error_;
};

}  // namespace
}  // namespace dadpo
