// The kernels on AVX2, which has no 8-bit dot product into 32 bits.
//
// Four-bit weights: vpmaddubsw gives 16-bit sums of two products. A weight is at most 15 and an activation at least
// -128, so eight of them fit 16 bits (8 * 2 * 15 * 128 = 30720) and widening is needed only every 32 inputs.
// Eight-bit weights: vpmaddubsw would saturate, so both sides are widened to 16 bits and vpmaddwd is exact.
#include "driver.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE __attribute__((target("avx2"), always_inline)) static inline

// A sum that the compiler must have in a register here. Left alone, it computes all products first and spills them.
#define KEEP(value) asm("" : "+x"(value))

namespace quantkit {
namespace {

constexpr int WIDEN = 8;  // additions of vpmaddubsw that fit 16 bits

AVX2_INLINE __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
AVX2_INLINE void store(void* at, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(at), value); }

AVX2_INLINE __m256i quad_of_bytes(const int8_t* at) {
    int32_t quad;
    std::memcpy(&quad, at, 4);
    return _mm256_set1_epi32(quad);
}

AVX2_INLINE __m256i quad_of_words(const int16_t* at) {
    int64_t quad;
    std::memcpy(&quad, at, 8);
    return _mm256_set1_epi64x(quad);
}

// The job's offset of eight channels, zero where there is none.
AVX2_INLINE __m256i offset_of(const int32_t* offset, int first) {
    return offset ? load(offset + first) : _mm256_setzero_si256();
}

// total + scale * (sum without the weights' offset, plus the job's): a multiplication and an addition, each rounded,
// since the reference has no fused one. `excess` is what the weights' offset added.
AVX2_INLINE __m256 add_group(__m256 total, __m256i sum, __m256i excess, __m256 scale, __m256i offset) {
    const __m256 value = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_sub_epi32(sum, excess), offset));
    return _mm256_add_ps(total, _mm256_mul_ps(value, scale));
}

// What unsigned four-bit weights add to a sum; eight-bit ones are widened to signed words.
template <int Bits>
AVX2_INLINE __m256i excess_of(int32_t activations) {
    return _mm256_set1_epi32(Bits == 4 ? activations * 8 : 0);
}

template <int Bits, bool Add>
AVX2 void finish_rows(const int32_t* acc, const int32_t* sums, int64_t rows, const float* scale,
                      const int32_t* offset, float* totals) {
    const __m256 scales[2] = {_mm256_loadu_ps(scale), _mm256_loadu_ps(scale + 8)};
    const __m256i offsets[2] = {offset_of(offset, 0), offset_of(offset, 8)};
    for (int64_t r = 0; r < rows; ++r) {
        const __m256i excess = excess_of<Bits>(sums[r]);
        for (int half = 0; half < 2; ++half) {
            float* total = totals + r * PANEL + 8 * half;
            const __m256 before = Add ? _mm256_loadu_ps(total) : _mm256_setzero_ps();
            _mm256_storeu_ps(total, add_group(before, load(acc + r * PANEL + 8 * half), excess, scales[half],
                                              offsets[half]));
        }
    }
}

template <int Bits>
void finish_group(const int32_t* acc, const int32_t* sums, int64_t rows, const float* scale, const int32_t* offset,
                  float* totals, bool add) {
    (add ? finish_rows<Bits, true> : finish_rows<Bits, false>)(acc, sums, rows, scale, offset, totals);
}

// One panel for some blocks of rows.
template <class Kernel>
void run_panel(const Job& job, int64_t panel, const Rows<Kernel>& rows, Scratch<Kernel>& scratch) {
    const int64_t groups = job.inputs / job.group, held = rows.last - rows.first;
    const uint8_t* weights = job.weights + panel * PANEL * job.inputs * Kernel::bits / 8;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t k = g * job.group; k < (g + 1) * job.group; k += SEGMENT) {
            const int64_t count = least(SEGMENT, (g + 1) * job.group - k);
            Kernel::expand(weights + k * PANEL * Kernel::bits / 8, scratch.expanded.data, count);
            for (int64_t b = rows.first; b < rows.last; ++b)
                Kernel::tile(rows.packed + k * rows.blocks * Kernel::rows + b * count * Kernel::rows,
                             scratch.expanded.data, count,
                             scratch.acc.data + (b - rows.first) * Kernel::rows * PANEL, k > g * job.group);
        }
        finish_group<Kernel::bits>(scratch.acc.data, rows.sums + (g * rows.blocks + rows.first) * Kernel::rows,
                                   held * Kernel::rows, job.scale + (panel * groups + g) * PANEL,
                                   job.offset ? job.offset + panel * PANEL : nullptr, scratch.totals.data, g > 0);
    }
    const int64_t row = rows.first * Kernel::rows;
    write_rows(job, panel, row, least(job.rows, rows.last * Kernel::rows) - row, scratch.totals.data);
}

struct FourBits {
    static constexpr int bits = 4, rows = 4, panels = 1, single_panels = 1;
    using Activation = int8_t;
    using Expanded = uint8_t;

    static void pack_row(const int8_t* from, int8_t* to, int64_t k) { pack_bytes<rows>(from, to, k); }
    static int32_t sum(const int8_t* values, int64_t count) { return sum_of(values, count); }

    AVX2 static void expand(const uint8_t* w, uint8_t* out, int64_t k) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int64_t i = 0; i < k * PANEL / 2; i += 64, w += 64, out += 128)
            for (int half = 0; half < 64; half += 32) {
                const __m256i both = load(w + half);
                store(out + half, _mm256_and_si256(both, low));
                store(out + 64 + half, _mm256_and_si256(_mm256_srli_epi16(both, 4), low));
            }
    }

    // `quads` times four inputs, at most WIDEN of them. The loop must be unrolled: carried over its edge, the sums are
    // spilled, and one sum through memory takes longer than the whole body.
    template <int64_t Quads>
    AVX2_INLINE void narrow(const int8_t* a, const uint8_t* w, int32_t* acc, bool add, int64_t quads = Quads) {
        const __m256i ones = _mm256_set1_epi16(1);
        __m256i sum[rows][2];
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int64_t i = 0; i < quads; ++i) {
            const __m256i left = load(w + 64 * i), right = load(w + 64 * i + 32);
            for (int r = 0; r < rows; ++r) {
                const __m256i x = quad_of_bytes(a + (i * rows + r) * QUAD);
                sum[r][0] = _mm256_add_epi16(sum[r][0], _mm256_maddubs_epi16(left, x));
                sum[r][1] = _mm256_add_epi16(sum[r][1], _mm256_maddubs_epi16(right, x));
                KEEP(sum[r][0]);
                KEEP(sum[r][1]);
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) {
                int32_t* to = acc + r * PANEL + half * 8;
                const __m256i wide = _mm256_madd_epi16(sum[r][half], ones);
                store(to, add ? _mm256_add_epi32(load(to), wide) : wide);
            }
    }

    AVX2 static void tile(const int8_t* a, const uint8_t* w, int64_t k, int32_t* acc, bool add) {
        int64_t quads = k / QUAD;
        for (; quads >= WIDEN; quads -= WIDEN, w += 64 * WIDEN, a += WIDEN * rows * QUAD, add = true)
            narrow<WIDEN>(a, w, acc, add);
        if (quads) narrow<0>(a, w, acc, add, quads);
    }

    template <int>
    AVX2 static void single(const int8_t* a, const uint8_t* w, const int32_t* sums, const float* scale,
                            const int32_t* offset, int64_t groups, int64_t group, float* totals) {
        const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
        __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
            __m256i acc[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            fetch_scale(scale);
            for (int64_t k = 0; k < group; k += WIDEN * QUAD) {
                const int64_t stop = least(group, k + WIDEN * QUAD);
                __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                for (int64_t i = k; i < stop; i += 2 * QUAD, w += 64, a += 2 * QUAD) {
                    const __m256i first = quad_of_bytes(a), second = quad_of_bytes(a + QUAD);
                    fetch_weights(w);
                    for (int half = 0; half < 2; ++half) {
                        const __m256i both = load(w + 32 * half);
                        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                        sum[half] = _mm256_add_epi16(
                            sum[half], _mm256_maddubs_epi16(_mm256_and_si256(both, low), first));
                        sum[half] = _mm256_add_epi16(sum[half], _mm256_maddubs_epi16(high, second));
                    }
                }
                for (int half = 0; half < 2; ++half)
                    acc[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(sum[half], ones));
            }
            for (int half = 0; half < 2; ++half)
                total[half] = add_group(total[half], acc[half], excess_of<bits>(sums[g]),
                                        _mm256_loadu_ps(scale + 8 * half), offset_of(offset, 8 * half));
        }
        _mm256_storeu_ps(totals, total[0]);
        _mm256_storeu_ps(totals + 8, total[1]);
    }

    template <int>
    static void run_panels(const Job& job, int64_t panel, const Rows<FourBits>& rows, Scratch<FourBits>& scratch) {
        run_panel(job, panel, rows, scratch);
    }
};

// Two registers of four channels with two 32-bit sums each: one register of eight channels.
AVX2_INLINE __m256i join_pairs(__m256i left, __m256i right) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(left, right), 0xD8);
}

// Sixteen signed weights.
AVX2_INLINE __m256i words(const uint8_t* at) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return _mm256_sub_epi16(wide, _mm256_set1_epi16(128));
}

struct EightBits {
    static constexpr int bits = 8, rows = 4, panels = 1, single_panels = 1;
    using Activation = int16_t;
    using Expanded = int16_t;

    static int32_t sum(const int8_t*, int64_t) { return 0; }

    AVX2 static void pack_row(const int8_t* from, int16_t* to, int64_t k) {
        int64_t i = 0;
        for (; i + 8 <= k; i += 8) {
            const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
            _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i * rows), wide);
            _mm_storeh_pd(reinterpret_cast<double*>(to + (i + QUAD) * rows), _mm_castsi128_pd(wide));
        }
        for (; i < k; ++i) to[i / QUAD * QUAD * rows + i % QUAD] = from[i];
    }

    AVX2 static void expand(const uint8_t* w, int16_t* out, int64_t k) {
        for (int64_t i = 0; i < k * PANEL; i += 16) store(out + i, words(w + i));
    }

    AVX2 static void tile(const int16_t* a, const int16_t* w, int64_t k, int32_t* acc, bool add) {
        for (int half = 0; half < 2; ++half) tile_of_half(a, w + 32 * half, k / QUAD, acc + 8 * half, add);
    }

    // Eight channels, so that the sums of all rows stay in registers.
    AVX2_INLINE void tile_of_half(const int16_t* a, const int16_t* w, int64_t quads, int32_t* acc, bool add) {
        __m256i sum[rows][2];
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t q = 0; q < quads; ++q) {
            const __m256i left = load(w + 64 * q), right = load(w + 64 * q + 16);
            for (int r = 0; r < rows; ++r) {
                const __m256i x = quad_of_words(a + (q * rows + r) * QUAD);
                sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(left, x));
                sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(right, x));
            }
        }
        for (int r = 0; r < rows; ++r) {
            const __m256i joined = join_pairs(sum[r][0], sum[r][1]);
            int32_t* to = acc + r * PANEL;
            store(to, add ? _mm256_add_epi32(load(to), joined) : joined);
        }
    }

    template <int>
    AVX2 static void single(const int16_t* a, const uint8_t* w, const int32_t* sums, const float* scale,
                            const int32_t* offset, int64_t groups, int64_t group, float* totals) {
        __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
            __m256i sum[4];
            for (int c = 0; c < 4; ++c) sum[c] = _mm256_setzero_si256();
            for (int64_t k = 0; k < group; k += QUAD, w += 64, a += QUAD) {
                const __m256i x = quad_of_words(a);
                fetch_weights(w);
                for (int c = 0; c < 4; ++c)
                    sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(words(w + 16 * c), x));
            }
            for (int half = 0; half < 2; ++half)
                total[half] = add_group(total[half], join_pairs(sum[2 * half], sum[2 * half + 1]),
                                        excess_of<bits>(sums[g]), _mm256_loadu_ps(scale + 8 * half),
                                        offset_of(offset, 8 * half));
        }
        _mm256_storeu_ps(totals, total[0]);
        _mm256_storeu_ps(totals + 8, total[1]);
    }

    template <int>
    static void run_panels(const Job& job, int64_t panel, const Rows<EightBits>& rows, Scratch<EightBits>& scratch) {
        run_panel(job, panel, rows, scratch);
    }
};

}  // namespace

Kernels avx2_kernels() { return {run<FourBits>, run<EightBits>}; }

}  // namespace quantkit

#else
namespace quantkit {
Kernels avx2_kernels() { return {nullptr, nullptr}; }
}  // namespace quantkit
#endif
