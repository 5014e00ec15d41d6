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
#define KEEP(value)
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
// A sum that the compiler must have in a register here. Left alone, it moves all of them through memory.
#define KEEP(value) asm("" : "+v"(value))
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

// What a sum starts from: the job's offset, less what the weights' offset will add.
template <int Bits>
VNNI_INLINE __m512i start_of(int32_t activations, const int32_t* offset) {
    const __m512i excess = _mm512_set1_epi32(activations * (1 << (Bits - 1)));
    return _mm512_sub_epi32(offset ? load(offset) : _mm512_setzero_si512(), excess);
}

// A multiplication and an addition, each rounded: the reference has no fused one.
VNNI_INLINE __m512 add_group(__m512 total, __m512i sum, const float* scale) {
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(scale)));
}

VNNI_INLINE __m512 finished(__m512 total, float by, const float* bias) {
    const __m512 value = _mm512_mul_ps(total, _mm512_set1_ps(by));
    return bias ? _mm512_add_ps(value, _mm512_loadu_ps(bias)) : value;
}

// Eight rows and three panels: 24 sums, three registers of weights and one of activations are what there is room for.
constexpr int ROWS = 8, PANELS = 3;
// A single row reads several panels side by side, which keeps more lines in flight.
constexpr int SINGLE_PANELS = 4;

using Sums = __m512i[2];  // two chains of one panel

struct FourBits {
    static constexpr int bits = 4;

    // Sixty-four bytes of weights with eight inputs.
    VNNI_INLINE void add(Sums& sum, const uint8_t* w, const int8_t* a) {
        const __m512i low = _mm512_set1_epi8(15), both = load(w);
        sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_and_si512(both, low), quad_of_bytes(a));
        sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_and_si512(_mm512_srli_epi16(both, 4), low),
                                     quad_of_bytes(a + QUAD));
    }

    // `k` inputs of a panel as bytes, in `out`.
    VNNI static const uint8_t* expanded(const uint8_t* w, uint8_t* out, int64_t k) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int64_t i = 0; i < k * PANEL / 2; i += 64) {
            const __m512i both = load(w + i);
            _mm512_storeu_si512(out + 2 * i, _mm512_and_si512(both, low));
            _mm512_storeu_si512(out + 2 * i + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
        return out;
    }
};

struct EightBits {
    static constexpr int bits = 8;

    VNNI_INLINE void add(Sums& sum, const uint8_t* w, const int8_t* a) {
        sum[0] = _mm512_dpbusd_epi32(sum[0], load(w), quad_of_bytes(a));
    }

    static const uint8_t* expanded(const uint8_t* w, uint8_t*, int64_t) { return w; }
};

// Part of a group: `k` inputs of one block of rows and of `Panels` panels.
struct Part {
    int64_t group, row, k;
    bool first, last;  // of the group's parts
    const int8_t* activations;
    const int32_t* sums;
    int32_t* acc;
    float* totals;
};

template <class Format, int Panels>
VNNI void multiply(const Job& job, int64_t panel, const Part& part, const uint8_t* const* weights) {
    const int64_t groups = job.inputs / job.group;
    __m512i sum[ROWS][Panels];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < Panels; ++p)
            sum[r][p] = part.first ? start_of<Format::bits>(
                                         part.sums[r], job.offset ? job.offset + (panel + p) * PANEL : nullptr)
                                   : load(part.acc + (r * Panels + p) * PANEL);
    const int8_t* a = part.activations;
    for (int64_t i = 0; i < part.k * PANEL; i += 64, a += ROWS * QUAD) {
        __m512i w[Panels];
        for (int p = 0; p < Panels; ++p) w[p] = load(weights[p] + i);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
            const __m512i x = quad_of_bytes(a + r * QUAD);
            for (int p = 0; p < Panels; ++p) {
                sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], w[p], x);
                KEEP(sum[r][p]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < Panels; ++p) {
            const int64_t at = (r * Panels + p) * PANEL, row = part.row + r, channel = (panel + p) * PANEL;
            if (!part.last) {
                _mm512_storeu_si512(part.acc + at, sum[r][p]);
                continue;
            }
            const __m512 before = part.group ? _mm512_loadu_ps(part.totals + at) : _mm512_setzero_ps();
            const __m512 total = add_group(before, sum[r][p], job.scale + ((panel + p) * groups + part.group) * PANEL);
            if (part.group < groups - 1)
                _mm512_storeu_ps(part.totals + at, total);
            else if (row < job.rows)
                _mm512_storeu_ps(job.out + row * job.channels + channel,
                                 finished(total, job.activation_scale[row], job.bias ? job.bias + channel : nullptr));
        }
}

// The weights of this format, as the driver's loops want them.
template <class Format>
struct Kernel {
    static constexpr int bits = Format::bits, rows = ROWS, panels = PANELS, single_panels = SINGLE_PANELS;
    using Activation = int8_t;
    using Expanded = uint8_t;

    static void pack_row(const int8_t* from, int8_t* to, int64_t k) { pack_bytes<rows>(from, to, k); }

    VNNI static int32_t sum(const int8_t* values, int64_t count) {
        __m512i total = _mm512_setzero_si512();
        int64_t i = 0;
        for (; i + 64 <= count; i += 64) total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), load(values + i));
        int32_t lanes[16], sum = sum_of(values + i, count - i);
        _mm512_storeu_si512(lanes, total);
        for (int lane : lanes) sum += lane;
        return sum;
    }

    template <int Panels>
    static void run_panels(const Job& job, int64_t panel, const Rows<Kernel>& rows, Scratch<Kernel>& scratch) {
        const int64_t stride = PANEL * job.inputs * bits / 8;
        for (int64_t g = 0; g < job.inputs / job.group; ++g)
            for (int64_t k = g * job.group; k < (g + 1) * job.group; k += SEGMENT) {
                const int64_t count = least(SEGMENT, (g + 1) * job.group - k);
                const uint8_t* weights[Panels];
                for (int p = 0; p < Panels; ++p)
                    weights[p] = Format::expanded(job.weights + (panel + p) * stride + k * PANEL * bits / 8,
                                                  scratch.expanded.data + p * PANEL * SEGMENT, count);
                for (int64_t b = rows.first; b < rows.last; ++b) {
                    const int64_t at = (b - rows.first) * ROWS * Panels * PANEL;
                    multiply<Format, Panels>(job, panel,
                                             {g, b * ROWS, count, k == g * job.group, k + count == (g + 1) * job.group,
                                              rows.packed + k * rows.blocks * ROWS + b * count * ROWS,
                                              rows.sums + (g * rows.blocks + b) * ROWS, scratch.acc.data + at,
                                              scratch.totals.data + at},
                                             weights);
                }
            }
    }

    template <int Panels>
    VNNI static void single(const int8_t* a, const uint8_t* w, const int32_t* sums, const float* scale,
                            const int32_t* offset, int64_t groups, int64_t group, float* totals) {
        const int64_t stride = groups * group * PANEL * bits / 8;
        __m512 total[Panels];
        for (int p = 0; p < Panels; ++p) total[p] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g, scale += PANEL) {
            Sums sum[Panels];
            for (int p = 0; p < Panels; ++p) {
                sum[p][0] = start_of<bits>(sums[g], offset ? offset + p * PANEL : nullptr);
                sum[p][1] = _mm512_setzero_si512();
            }
            for (int p = 0; p < Panels; ++p) fetch_scale(scale + p * groups * PANEL);
            for (int64_t k = 0; k < group; k += 32 / bits, w += 64, a += 32 / bits)
                for (int p = 0; p < Panels; ++p) {
                    fetch_weights(w + p * stride);
                    Format::add(sum[p], w + p * stride, a);
                }
            for (int p = 0; p < Panels; ++p)
                total[p] = add_group(total[p], _mm512_add_epi32(sum[p][0], sum[p][1]), scale + p * groups * PANEL);
        }
        for (int p = 0; p < Panels; ++p) _mm512_storeu_ps(totals + p * PANEL, total[p]);
    }
};

}  // namespace

Kernels vnni_kernels() { return {run<Kernel<FourBits>>, run<Kernel<EightBits>>}; }

}  // namespace quantkit

#else
namespace quantkit {
Kernels vnni_kernels() { return {nullptr, nullptr}; }
}  // namespace quantkit
#endif
