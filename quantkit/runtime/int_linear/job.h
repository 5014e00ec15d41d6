// What the dispatcher hands to the kernels, and the layout they share.
#pragma once

#include <cstdint>

namespace quantkit {

constexpr int PANEL = 16;          // output channels computed together
constexpr int QUAD = 4;            // inputs of one channel that lie side by side: what one dot-product lane reads
constexpr int SEGMENT = 512;       // inputs expanded at a time, so that a panel's share stays in the first-level cache
constexpr int ROW_CHUNK = 128;     // rows that use an expanded segment before the next one is expanded

// One product of activations and weights. Weights are unsigned (code + 2^(bits-1)), so that a signed activation byte
// meets an unsigned weight byte as the dot-product instructions want; the sums of the activations take the offset out.
//   weights  8 bits: [N/16][K/4][16][4] bytes
//            4 bits: [N/16][K/8][16][4] bytes, low nibble input 8j+i, high nibble input 8j+4+i
//   scale    [N/16][K/group][16]
struct Job {
    const int8_t* activations;     // [M][K]
    const float* activation_scale; // [M]
    const uint8_t* weights;
    const float* scale;
    const int32_t* offset;         // [N], added to the integer sum of the only group; may be null
    const float* bias;             // [N], may be null
    float* out;                    // [M][N]
    int64_t rows, channels, inputs, group;
    int threads;
};

// The kernels of one instruction set, or null where it has none.
struct Kernels {
    void (*four_bits)(const Job&);
    void (*eight_bits)(const Job&);
};

Kernels avx2_kernels();
Kernels vnni_kernels();

}  // namespace quantkit
