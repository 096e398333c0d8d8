// No instruction set beyond the compiler's own: vectors of four that it may or may not find registers for.
#include "kernels.h"

namespace {

struct Plain {
    static constexpr int width = 4;
    static constexpr int tile_rows = 2;
    static constexpr int dot_rows = 2;  // by four
    struct F {
        float x[width];
    };
    struct I {
        std::int32_t x[width];
    };

    template <class Out, class Each>
    static Out made(Each each) {
        Out out;
        for (int i = 0; i < width; ++i) out.x[i] = each(i);
        return out;
    }

    static F zero() { return set1(0.0f); }
    static F set1(float x) {
        return made<F>([=](int) { return x; });
    }
    static F load(const float* at) {
        return made<F>([=](int i) { return at[i]; });
    }
    static void store(float* at, F x) {
        for (int i = 0; i < width; ++i) at[i] = x.x[i];
    }
    static F add(F a, F b) {
        return made<F>([=](int i) { return a.x[i] + b.x[i]; });
    }
    static F sub(F a, F b) {
        return made<F>([=](int i) { return a.x[i] - b.x[i]; });
    }
    static F mul(F a, F b) {
        return made<F>([=](int i) { return a.x[i] * b.x[i]; });
    }
    static F div(F a, F b) {
        return made<F>([=](int i) { return a.x[i] / b.x[i]; });
    }
    static F fma(F a, F b, F c) {
        return made<F>([=](int i) { return a.x[i] * b.x[i] + c.x[i]; });
    }
    static F max(F a, F b) {
        return made<F>([=](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
    }
    static F min(F a, F b) {
        return made<F>([=](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; });
    }
    static F abs(F a) {
        return made<F>([=](int i) { return a.x[i] < 0.0f ? -a.x[i] : a.x[i]; });
    }
    static F round(F a) {
        return made<F>([=](int i) { return __builtin_rintf(a.x[i]); });
    }
    static I to_int(F a) {
        return made<I>([=](int i) { return static_cast<std::int32_t>(a.x[i]); });
    }
    static F to_float(I a) {
        return made<F>([=](int i) { return static_cast<float>(a.x[i]); });
    }
    static F power_of_2(I n) {
        return made<F>([=](int i) { return from_bits(static_cast<std::uint32_t>(n.x[i] + 127) << 23); });
    }
    static F first(F x, int count) {
        return made<F>([=](int i) { return i < count ? x.x[i] : 0.0f; });
    }
    static unsigned above(F a, F b) {
        unsigned found = 0;
        for (int i = 0; i < width; ++i) found |= static_cast<unsigned>(a.x[i] > b.x[i]) << i;
        return found;
    }
    static float total(F x) { return (x.x[0] + x.x[2]) + (x.x[1] + x.x[3]); }
    static void totals(F a, F b, F c, F d, float* out) {
        out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
    }
    static float largest(F x) {
        float found = x.x[0];
        for (float each : x.x) found = each > found ? each : found;
        return found;
    }
    static float root(float x) { return __builtin_sqrtf(x); }

    static I set1_word(std::int32_t x) {
        return made<I>([=](int) { return x; });
    }
    static I load_words(const void* at) {
        I out;
        __builtin_memcpy(out.x, at, sizeof(out.x));
        return out;
    }
    static void store_words(void* at, I x) { __builtin_memcpy(at, x.x, sizeof(x.x)); }
    static I sub_words(I a, I b) {
        return made<I>([=](int i) { return a.x[i] - b.x[i]; });
    }
    static I times_zero_point(I sums) {
        return made<I>([=](int i) { return sums.x[i] * 128; });
    }
    static void store_bytes(std::uint8_t* at, I x) {
        for (int i = 0; i < width; ++i) at[i] = static_cast<std::uint8_t>(x.x[i] + 128);
    }
    static float from_bits(std::uint32_t bits) {
        float x;
        __builtin_memcpy(&x, &bits, 4);
        return x;
    }
    static F load_bf16(const std::uint16_t* at) {
        return made<F>([=](int i) { return from_bits(static_cast<std::uint32_t>(at[i]) << 16); });
    }
    static void store_bf16(std::uint16_t* at, F x);
    static F dot_bf16(F sum, I w, I a) {
        return made<F>([=](int i) {
            const auto wide_w = static_cast<std::uint32_t>(w.x[i]), wide_a = static_cast<std::uint32_t>(a.x[i]);
            const float low = sum.x[i] + from_bits(wide_w << 16) * from_bits(wide_a << 16);
            return low + from_bits(wide_w & 0xffff0000u) * from_bits(wide_a & 0xffff0000u);
        });
    }
    static I dot_u8s8(I sum, I w, I a) {
        return made<I>([=](int i) {
            std::int32_t found = sum.x[i];
            for (int b = 0; b < 4; ++b) {
                const auto byte = static_cast<std::int32_t>((static_cast<std::uint32_t>(a.x[i]) >> (8 * b)) & 0xffu);
                found += byte * static_cast<std::int8_t>((static_cast<std::uint32_t>(w.x[i]) >> (8 * b)) & 0xffu);
            }
            return found;
        });
    }
    static void prefetch(const std::byte* at) { __builtin_prefetch(at); }
};

}  // namespace

#include "kernels.inl"

namespace {
void Plain::store_bf16(std::uint16_t* at, F x) {
    for (int i = 0; i < width; ++i) at[i] = rounded_bf16(x.x[i]);
}
}  // namespace

namespace speeder::cpu {

constexpr Kernels plain_kernels = kernels_of<Plain>("plain");

std::size_t attention_work(int group, int dim, int max_keys, int max_path) {
    const std::size_t keys = static_cast<std::size_t>(padded(max_keys)), wide = static_cast<std::size_t>(padded(dim));
    const std::size_t queries = static_cast<std::size_t>(kChunkRows) * static_cast<std::size_t>(group);
    const std::size_t path = static_cast<std::size_t>(max_path);
    return keys * (static_cast<std::size_t>(dim) + wide) + queries * (static_cast<std::size_t>(dim) + keys + wide) +
           wide + queries * (1 + path);
}

const Kernels* pick(std::string_view name) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && (name.empty() || name == "avx512")) return &avx512_kernels;
    if (avx2 && (name.empty() || name == "avx2")) return &avx2_kernels;
#endif
    return name.empty() || name == "plain" ? &plain_kernels : nullptr;
}

}  // namespace speeder::cpu
