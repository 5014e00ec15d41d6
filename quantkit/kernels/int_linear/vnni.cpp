// The kernels on AVX512-VNNI: vpdpbusd adds four products of an unsigned weight byte and a signed activation byte to
// each of sixteen 32-bit sums, so nothing needs widening.
//
// Compiled with QUANTKIT_EMULATE, the intrinsics are those of SIMDe and run on any CPU: a check of the results only.
#include "driver.h"

#if defined(QUANTKIT_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#define VNNI
#define VNNI_INLINE static inline
static inline __m512 _mm512_cvtepi32_ps(__m512i integers) {  // SIMDe 0.7.4 lacks it
    int32_t from[16];
    float to[16];
    std::memcpy(from, &integers, 64);
    for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(from[i]);
    return _mm512_loadu_ps(to);
}
#elif defined(__x86_64__)
#include <immintrin.h>
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define VNNI_INLINE __attribute__((target("avx512f,avx512bw,avx512vnni"), always_inline)) static inline
#endif

#if defined(VNNI)
namespace quantkit {
namespace {

VNNI_INLINE __m512i load(const void* at) { return _mm512_loadu_si512(at); }

VNNI_INLINE __m512i quad_of_bytes(const int8_t* at) {
    int32_t quad;
    std::memcpy(&quad, at, 4);
    return _mm512_set1_epi32(quad);
}

// A multiplication and an addition, each rounded: the reference has no fused one.
template <int Bits>
VNNI_INLINE __m512 add_group(__m512 total, __m512i sum, int32_t activations, const float* scale,
                             const int32_t* offset) {
    __m512i value = _mm512_sub_epi32(sum, _mm512_set1_epi32(activations * (1 << (Bits - 1))));
    if (offset) value = _mm512_add_epi32(value, load(offset));
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(value), _mm512_loadu_ps(scale)));
}

template <int Bits>
VNNI void finish_rows(const int32_t* acc, const int32_t* sums, int64_t rows, const float* scale,
                      const int32_t* offset, float* totals, bool add) {
    for (int64_t r = 0; r < rows; ++r) {
        const __m512 before = add ? _mm512_loadu_ps(totals + r * PANEL) : _mm512_setzero_ps();
        _mm512_storeu_ps(totals + r * PANEL, add_group<Bits>(before, load(acc + r * PANEL), sums[r], scale, offset));
    }
}

// Eight rows, two sums each: sixteen chains hide the latency of vpdpbusd.
constexpr int ROWS = 8;

VNNI void tile_of_bytes(const int8_t* a, const uint8_t* w, int64_t k, int32_t* acc, bool add) {
    __m512i even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        even[r] = add ? load(acc + r * PANEL) : _mm512_setzero_si512();
        odd[r] = _mm512_setzero_si512();
    }
    int64_t q = 0;
    for (; q + 2 <= k / QUAD; q += 2, w += 128, a += 2 * ROWS * QUAD) {
        const __m512i first = load(w), second = load(w + 64);
        for (int r = 0; r < ROWS; ++r) {
            even[r] = _mm512_dpbusd_epi32(even[r], first, quad_of_bytes(a + r * QUAD));
            odd[r] = _mm512_dpbusd_epi32(odd[r], second, quad_of_bytes(a + (ROWS + r) * QUAD));
        }
    }
    if (q < k / QUAD)
        for (int r = 0; r < ROWS; ++r) even[r] = _mm512_dpbusd_epi32(even[r], load(w), quad_of_bytes(a + r * QUAD));
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_si512(acc + r * PANEL, _mm512_add_epi32(even[r], odd[r]));
}

struct FourBits {
    static constexpr int bits = 4, rows = ROWS;
    static constexpr bool needs_sums = true;
    using Activation = int8_t;
    using Expanded = uint8_t;

    static void pack_row(const int8_t* from, int8_t* to, int64_t k) { pack_bytes<rows>(from, to, k); }

    VNNI static void expand(const uint8_t* w, uint8_t* out, int64_t k) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int64_t i = 0; i < k * PANEL / 2; i += 64, w += 64, out += 128) {
            const __m512i both = load(w);
            _mm512_storeu_si512(out, _mm512_and_si512(both, low));
            _mm512_storeu_si512(out + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
    }

    static void tile(const int8_t* a, const uint8_t* w, int64_t k, int32_t* acc, bool add) {
        tile_of_bytes(a, w, k, acc, add);
    }

    VNNI static void single(const int8_t* a, const uint8_t* w, const int32_t* sums, const float* scale,
                            const int32_t* offset, int64_t groups, int64_t group, float* totals) {
        const __m512i low = _mm512_set1_epi8(15);
        __m512 total = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
            __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
            for (int64_t k = 0; k < group; k += 2 * QUAD, w += 64, a += 2 * QUAD) {
                const __m512i both = load(w);
                _mm_prefetch(reinterpret_cast<const char*>(w) + 1536, _MM_HINT_T0);
                even = _mm512_dpbusd_epi32(even, _mm512_and_si512(both, low), quad_of_bytes(a));
                odd = _mm512_dpbusd_epi32(odd, _mm512_and_si512(_mm512_srli_epi16(both, 4), low),
                                          quad_of_bytes(a + QUAD));
            }
            total = add_group<bits>(total, _mm512_add_epi32(even, odd), sums[g], scale, offset);
        }
        _mm512_storeu_ps(totals, total);
    }

    static void finish(const int32_t* acc, const int32_t* sums, int64_t count, const float* scale,
                       const int32_t* offset, float* totals, bool add) {
        finish_rows<bits>(acc, sums, count, scale, offset, totals, add);
    }
};

struct EightBits {
    static constexpr int bits = 8, rows = ROWS;
    static constexpr bool needs_sums = true;
    using Activation = int8_t;
    using Expanded = uint8_t;

    static void pack_row(const int8_t* from, int8_t* to, int64_t k) { pack_bytes<rows>(from, to, k); }

    static void expand(const uint8_t* w, uint8_t* out, int64_t k) { std::memcpy(out, w, k * PANEL); }

    static void tile(const int8_t* a, const uint8_t* w, int64_t k, int32_t* acc, bool add) {
        tile_of_bytes(a, w, k, acc, add);
    }

    VNNI static void single(const int8_t* a, const uint8_t* w, const int32_t* sums, const float* scale,
                            const int32_t* offset, int64_t groups, int64_t group, float* totals) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
            __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int64_t k = 0; k < group; k += QUAD, w += 64, a += QUAD) {
                _mm_prefetch(reinterpret_cast<const char*>(w) + 1536, _MM_HINT_T0);
                sum[k / QUAD % 2] = _mm512_dpbusd_epi32(sum[k / QUAD % 2], load(w), quad_of_bytes(a));
            }
            total = add_group<bits>(total, _mm512_add_epi32(sum[0], sum[1]), sums[g], scale, offset);
        }
        _mm512_storeu_ps(totals, total);
    }

    static void finish(const int32_t* acc, const int32_t* sums, int64_t count, const float* scale,
                       const int32_t* offset, float* totals, bool add) {
        finish_rows<bits>(acc, sums, count, scale, offset, totals, add);
    }
};

}  // namespace

Kernels vnni_kernels() { return {run<FourBits>, run<EightBits>}; }

}  // namespace quantkit

#else
namespace quantkit {
Kernels vnni_kernels() { return {nullptr, nullptr}; }
}  // namespace quantkit
#endif
