// The plain C interface that Python calls through ctypes.
#include <cfloat>

#include "driver.h"

namespace {

enum InstructionSet { NONE = 0, AVX2 = 1, VNNI = 2 };

bool has(int wanted) {
#if defined(QUANTKIT_EMULATE)
    return wanted == VNNI;
#elif defined(__x86_64__)
    __builtin_cpu_init();
    if (wanted == AVX2) return __builtin_cpu_supports("avx2");
    if (wanted == VNNI)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

// Plain loops, compiled for several instruction sets; the loader picks the best that the CPU has.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORIZED __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define VECTORIZED
#endif

constexpr float NO_FRACTION = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction, half to even

// Codes round(x / scale), half to even, within +-127, of one row; scale = largest magnitude / 127, at least the smallest
// normal number. Written so that every compiler vectorizes it: magnitudes compare as integers.
VECTORIZED void quantize_row(const float* x, int64_t count, int8_t* codes, float* scale) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    float step = magnitude / 127.0f;
    if (step < FLT_MIN) step = FLT_MIN;
    for (int64_t i = 0; i < count; ++i)
        codes[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] / step + NO_FRACTION) - NO_FRACTION));
    *scale = step;
}

// Codes round(x / scale) + zero point within 0..high, less 128: unsigned codes moved into a signed byte.
VECTORIZED void quantize_static(const float* x, int64_t count, float scale, float zero_point, float high,
                                int8_t* codes) {
    for (int64_t i = 0; i < count; ++i) {
        float value = x[i] / scale;
        value = value < -1024.0f ? -1024.0f : value;  // inside the range that the rounding below is right for
        value = value > 1024.0f ? 1024.0f : value;
        value = ((value + NO_FRACTION) - NO_FRACTION) + zero_point;
        value = value < 0.0f ? 0.0f : value;
        value = value > high ? high : value;
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(value) - 128);
    }
}

}  // namespace

extern "C" {

// 1 where this CPU runs the kernels of an instruction set (1: AVX2, 2: AVX512-VNNI), else 0.
int quantkit_supports(int instruction_set) { return has(instruction_set); }

// Product of int8 activations and packed 4- or 8-bit weights, see job.h. Returns 0, or 1 where it cannot run.
int quantkit_int_linear(const int8_t* activations, const float* activation_scale, const uint8_t* weights,
                        const float* scale, const int32_t* offset, const float* bias, float* out, int64_t rows,
                        int64_t channels, int64_t inputs, int64_t group, int bits, int instruction_set, int threads) {
    if (!has(instruction_set)) return 1;
    const quantkit::Job job = {activations, activation_scale, weights, scale,  offset, bias, out,
                               rows,        channels,         inputs,  group, threads};
    const quantkit::Kernels kernels =
        instruction_set == VNNI ? quantkit::vnni_kernels() : quantkit::avx2_kernels();
    (bits == 4 ? kernels.four_bits : kernels.eight_bits)(job);
    return 0;
}

// Symmetric int8 codes of float rows, each with its own scale.
void quantkit_quantize_rows(const float* x, int64_t rows, int64_t count, int8_t* codes, float* scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 8)
    for (int64_t row = 0; row < rows; ++row) quantize_row(x + row * count, count, codes + row * count, scale + row);
}

// A layer's weight with everything about it that does not change from call to call.
struct quantkit_layer {
    const uint8_t* weights;
    const float* scale;
    const float* bias;
    int64_t channels, inputs, group;
    int bits, instruction_set;
};

// quantkit_quantize_rows and quantkit_int_linear in one call of few arguments: for a single row, what Python does for a
// call costs as much as reading a tenth of the weights.
int quantkit_dynamic_linear(const quantkit_layer* layer, const float* x, float* out, int64_t rows, int threads) {
    const quantkit::Buffer<int8_t> codes(rows * layer->inputs);
    const quantkit::Buffer<float> scale(rows);
    quantkit_quantize_rows(x, rows, layer->inputs, codes.data, scale.data, threads);
    return quantkit_int_linear(codes.data, scale.data, layer->weights, layer->scale, nullptr, layer->bias, out, rows,
                               layer->channels, layer->inputs, layer->group, layer->bits, layer->instruction_set,
                               threads);
}

// Codes of a float tensor [images][height][width][channels] under one scale and zero point, unsigned codes up to
// `high` less 128, inside a border of `pad` = {top, bottom, left, right} whose value is 0.
void quantkit_quantize_padded(const float* x, int64_t images, int64_t height, int64_t width, int64_t channels,
                              const int64_t* pad, float scale, int zero_point, int high, int8_t* codes, int threads) {
    const int64_t tall = height + pad[0] + pad[1], wide = width + pad[2] + pad[3];
    const int border = zero_point - 128;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < images * tall; ++line) {
        int8_t* to = codes + line * wide * channels;
        const int64_t row = line % tall - pad[0];
        if (row < 0 || row >= height) {
            std::memset(to, border, wide * channels);
            continue;
        }
        std::memset(to, border, pad[2] * channels);
        to += pad[2] * channels;
        quantize_static(x + ((line / tall) * height + row) * width * channels, width * channels, scale,
                        static_cast<float>(zero_point), static_cast<float>(high), to);
        std::memset(to + width * channels, border, pad[3] * channels);
    }
}

// Windows of a padded [images][tall][wide][channels] tensor as rows of `inputs` >= kernel area * channels bytes, in the
// order (kernel row, kernel column, channel); what is left of a row is 0. `shape` = {tall, wide, channels, out height,
// out width, kernel height, kernel width, stride down, stride right, dilation down, dilation right}.
void quantkit_windows(const int8_t* codes, int64_t images, const int64_t* shape, int64_t inputs, int8_t* rows,
                      int threads) {
    const int64_t tall = shape[0], wide = shape[1], channels = shape[2], height = shape[3], width = shape[4];
    const int64_t run = shape[10] == 1 ? shape[6] * channels : channels;  // bytes that lie side by side in both
    const int64_t runs = shape[6] * channels / run;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t line = 0; line < images * height; ++line) {
        const int8_t* top = codes + ((line / height) * tall + (line % height) * shape[7]) * wide * channels;
        for (int64_t x = 0; x < width; ++x) {
            int8_t* to = rows + (line * width + x) * inputs;
            for (int64_t down = 0; down < shape[5]; ++down)
                for (int64_t right = 0; right < runs; ++right, to += run)
                    std::memcpy(to, top + (down * shape[9] * wide + x * shape[8] + right * shape[10]) * channels, run);
            std::memset(to, 0, inputs - shape[5] * shape[6] * channels);
        }
    }
}

}  // extern "C"
