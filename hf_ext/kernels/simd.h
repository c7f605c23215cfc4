// What both operators need: vectors of the compiler (GCC and Clang), half precision, planes of codes, and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

// Lanes of the widest vector that fits into one register (two on the narrowest machines), and the number of registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#else
constexpr int LANES = 8, REGISTERS = 16;
#endif

template <int N> struct Vec;
template <> struct Vec<16> {
    typedef float f __attribute__((vector_size(64), aligned(4)));
    typedef int32_t i __attribute__((vector_size(64), aligned(4)));
    typedef uint8_t b __attribute__((vector_size(16), aligned(1)));
};
template <> struct Vec<8> {
    typedef float f __attribute__((vector_size(32), aligned(4)));
    typedef int32_t i __attribute__((vector_size(32), aligned(4)));
    typedef uint8_t b __attribute__((vector_size(8), aligned(1)));
};

template <int N> INLINE typename Vec<N>::f load(const float *from) {
    return *reinterpret_cast<const typename Vec<N>::f *>(from);
}
template <int N> INLINE void store(float *to, typename Vec<N>::f x) { *reinterpret_cast<typename Vec<N>::f *>(to) = x; }
template <int N> INLINE typename Vec<N>::i load_bytes(const uint8_t *from) {
    return __builtin_convertvector(*reinterpret_cast<const typename Vec<N>::b *>(from), typename Vec<N>::i);
}
// Codes of one plane as floats.
template <int N, int BITS> INLINE typename Vec<N>::f plane(typename Vec<N>::i bytes, int index) {
    return __builtin_convertvector((bytes >> (index * BITS)) & ((1 << BITS) - 1), typename Vec<N>::f);
}
typedef float f4 __attribute__((vector_size(16), aligned(4)));
INLINE f4 halves(f4 x) { return x; }
INLINE f4 halves(Vec<8>::f x) {
    f4 low, high;
    std::memcpy(&low, &x, 16);
    std::memcpy(&high, reinterpret_cast<const char *>(&x) + 16, 16);
    return low + high;
}
INLINE f4 halves(Vec<16>::f x) {
    Vec<8>::f low, high;
    std::memcpy(&low, &x, 32);
    std::memcpy(&high, reinterpret_cast<const char *>(&x) + 32, 32);
    return halves(low + high);
}
template <typename V> INLINE float sum(V x) {
    const f4 four = halves(x);
    return (four[0] + four[1]) + (four[2] + four[3]);
}

INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return from_bits(sign | to_bits(float(rest) * 0x1p-24f));
    return from_bits(sign | ((rest + 0x1c000) << 13));
#endif
}

// To the nearest, half to even.
INLINE uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
    // The sum of a subnormal half's value and 0.5 has exactly its bits at the end.
    if (size < 0x38800000) return uint16_t(sign | (to_bits(from_bits(size) + 0.5f) & 0x7ff));
    return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
}

// Scales and minima are stored as half (2 bytes) or float (4 bytes).
INLINE void load_numbers(const void *from, int64_t offset, bool half, int64_t count, float *to) {
    if (!half) {
        std::memcpy(to, static_cast<const float *>(from) + offset, count * sizeof(float));
        return;
    }
    const uint16_t *numbers = static_cast<const uint16_t *>(from) + offset;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(numbers + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(numbers + i))));
#endif
    for (; i < count; ++i) to[i] = half_to_float(numbers[i]);
}

// A code of `bits` bits is stored as one set of planes, or (3 bits) as a set of 2-bit planes and one of 1-bit planes.
struct Segment {
    int bits;
    int64_t offset;  // first byte within a token
    float weight;    // of its codes
};
INLINE int segments(int bits, int64_t channels, Segment out[2]) {
    if (bits != 3) {
        out[0] = {bits, 0, 1.f};
        return 1;
    }
    out[0] = {2, 0, 1.f};
    out[1] = {1, channels / 4, 4.f};
    return 2;
}

// Run work(part) for part 0 .. parts - 1, each on its own thread but the first.
template <typename F> void parallel(int parts, F work) {
    std::vector<std::thread> threads;
    for (int part = 1; part < parts; ++part) threads.emplace_back(work, part);
    work(0);
    for (auto &thread : threads) thread.join();
}
