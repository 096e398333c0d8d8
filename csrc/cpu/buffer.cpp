#include "buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace speeder::cpu {

#if !defined(__SANITIZE_ADDRESS__)
namespace {
constexpr std::size_t kHuge = std::size_t{2} << 20;
}
#endif

#if defined(__SANITIZE_ADDRESS__)
// to the byte: the sanitizer can't see the end of what is mapped in pages
Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    if (posix_memalign(reinterpret_cast<void**>(&data_), 64, bytes) != 0) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
}

Buffer::~Buffer() { std::free(data_); }
#else
// mmap gives zeroed pages; a whole huge page more, so that the part which is used can begin on one
Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    const std::size_t asked = (bytes + kHuge - 1) / kHuge * kHuge;
    void* found = mmap(nullptr, asked + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    auto* begin = static_cast<std::byte*>(found);
    const std::size_t before = (kHuge - reinterpret_cast<std::size_t>(begin) % kHuge) % kHuge;
    if (before > 0) munmap(begin, before);
    if (before < kHuge) munmap(begin + before + asked, kHuge - before);
    data_ = begin + before;
#if defined(MADV_HUGEPAGE)
    madvise(data_, asked, MADV_HUGEPAGE);
#endif
}

Buffer::~Buffer() {
    if (data_ != nullptr) munmap(data_, (bytes_ + kHuge - 1) / kHuge * kHuge);
}
#endif

Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

}  // namespace speeder::cpu
