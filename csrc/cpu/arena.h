// Hands out 64-byte aligned pieces of the caller's workspace. With a null base it only measures the size.
#pragma once

namespace dadpo {
namespace {

class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <typename U>
    U* take(long count) {  // elements
        U* piece = reinterpret_cast<U*>(base_ + used_);
        used_ += (count * static_cast<long>(sizeof(U)) + 63) / 64 * 64;
        return piece;
    }
    long used() const { return used_; }

private:
    char* base_;
    long used_ = 0;  // bytes
};

}  // namespace
}  // namespace dadpo
