// AVX-512 with bf16 products and int8 products of four (Zen 4, Cooper Lake, Sapphire Rapids and later).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// the compiler's own intrinsics begin with vectors that are left undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma")
#endif

namespace {

struct Avx512 {
    using F = __m512;
    using I = __m512i;
    static constexpr int width = 16;
    static constexpr int tile_rows = 14;  // by two vectors, with two of weights and one of the row: 31 of 32 registers
    static constexpr int dot_rows = 6;  // by four

    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* at) { return _mm512_loadu_ps(at); }
    static void store(float* at, F x) { _mm512_storeu_ps(at, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I to_int(F a) { return _mm512_cvtps_epi32(a); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F power_of_2(I n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
    }
    static F first(F x, int count) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count) - 1u), x); }
    static unsigned above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static float total(F x) { return _mm512_reduce_add_ps(x); }
    // of four vectors at once: thirteen instructions instead of as many for each
    static void totals(F a, F b, F c, F d, float* out) {
        const auto ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const auto cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const auto low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        const auto high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
        const auto all = _mm512_add_ps(low, high);
        const auto half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    static float largest(F x) { return _mm512_reduce_max_ps(x); }
    static float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

    static I set1_word(std::int32_t x) { return _mm512_set1_epi32(x); }
    static I load_words(const void* at) { return _mm512_loadu_si512(at); }
    static void store_words(void* at, I x) { _mm512_storeu_si512(at, x); }
    static I sub_words(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I times_zero_point(I sums) { return _mm512_slli_epi32(sums, 7); }
    static void store_bytes(std::uint8_t* at, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(x, _mm512_set1_epi32(128))));
    }
    static F load_bf16(const std::uint16_t* at) {
        const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static void store_bf16(std::uint16_t* at, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(x));
    }
    static F dot_bf16(F sum, I w, I a) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)a); }
    static I dot_u8s8(I sum, I w, I a) {
        // not the intrinsic: GCC 12 moves every sum through one register, which halves the speed
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
        return sum;
    }
    static void prefetch(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
};

}  // namespace

#include "kernels.inl"

namespace speeder::cpu {
constexpr Kernels avx512_kernels = kernels_of<Avx512>("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
