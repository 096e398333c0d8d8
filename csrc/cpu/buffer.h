// Memory for weights and activations: aligned, zeroed, in huge pages where the system gives them.
#pragma once

#include <cstddef>

namespace speeder::cpu {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t bytes);  // throws std::bad_alloc
    Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
        other.data_ = nullptr;
        other.bytes_ = 0;
    }
    Buffer& operator=(Buffer&& other) noexcept;
    ~Buffer();

    std::byte* data() const { return data_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    std::size_t bytes() const { return bytes_; }

private:
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace speeder::cpu
