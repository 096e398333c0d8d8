// AVX2 with fused multiply-add: bf16 is widened, int8 multiplied in pairs that can't overflow (-127 .. 127 on both sides).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace {

struct Avx2 {
    using F = __m256;
    using I = __m256i;
    static constexpr int width = 8;
    static constexpr int tile_rows = 3;  // by four vectors: twelve of sixteen registers
    static constexpr int dot_rows = 2;  // by four

    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F load(const float* at) { return _mm256_loadu_ps(at); }
    static void store(float* at, F x) { _mm256_storeu_ps(at, x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static I to_int(F a) { return _mm256_cvtps_epi32(a); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F power_of_2(I n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static F first(F x, int count) {
        const auto lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
    }
    static unsigned above(F a, F b) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
    }
    static float total(F x) {
        const auto four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const auto two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static void totals(F a, F b, F c, F d, float* out) {
        out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
    }
    static float largest(F x) {
        const auto four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        const auto two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

    static I set1_word(std::int32_t x) { return _mm256_set1_epi32(x); }
    static I load_words(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
    static void store_words(void* at, I x) { _mm256_storeu_si256(static_cast<__m256i*>(at), x); }
    static I sub_words(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I times_zero_point(I) { return _mm256_setzero_si256(); }  // dot_u8s8 has taken it away
    static void store_bytes(std::uint8_t* at, I x) {
        const auto shifted = _mm256_add_epi32(x, _mm256_set1_epi32(128));
        const auto words = _mm_packus_epi32(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(words, words));
    }
    static F load_bf16(const std::uint16_t* at) {
        const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static void store_bf16(std::uint16_t* at, F x) {
        const auto bits = _mm256_castps_si256(x);
        const auto odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const auto rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const auto quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const auto is_number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
        const auto high = _mm256_srli_epi32(_mm256_blendv_epi8(quiet, rounded, is_number), 16);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                         _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
    static F dot_bf16(F sum, I w, I a) {
        const auto high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        sum = fma(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), sum);
        return fma(_mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(a, high)), sum);
    }
    static I dot_u8s8(I sum, I w, I a) {
        const auto with_sign = _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(0x80)));
        const auto pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(with_sign), _mm256_sign_epi8(w, with_sign));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static void prefetch(const std::byte* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }
};

}  // namespace

#include "kernels.inl"

namespace speeder::cpu {
constexpr Kernels avx2_kernels = kernels_of<Avx2>("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
