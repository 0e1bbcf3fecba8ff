// Carves aligned pieces from the caller's workspace; with a null base it only counts.
#pragma once

namespace dadpo {
namespace {

class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <typename U>
    U* take(long count) {
        U* piece = reinterpret_cast<U*>(base_ + used_);
        used_ += (count * static_cast<long>(sizeof(U)) + 63) / 64 * 64;
        return piece;
    }
    long used() const { return used_; }

private:
    char* base_;
    long used_ = 0;
};

}  // namespace
}  // namespace dadpo
