// The loops around a kernel: panels over threads, rows in chunks, groups and segments of the inputs.
//
// A kernel is a struct with
//   bits, rows               width of the weights, rows of one tile
//   panels, single_panels    panels it takes at a time: for many rows, for one row
//   Activation, Expanded     element types of packed activations and of an expanded segment
//   pack_row(from, to, k)    lay out k activations of one row as the tiles read them
//   sum(values, count)       of activations, to take the weights' offset out with; 0 where there is none
//   run_panels<P>(...)       the output of P panels for some blocks of rows, through tiles of expanded weights
//   single<P>(...)           one row against P whole panels, straight from the packed weights
#pragma once

#include <cstdlib>
#include <cstring>

#include "job.h"

namespace quantkit {

template <class T>
struct Buffer {
    T* data;
    explicit Buffer(int64_t count)
        : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64 + 64))) {}
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Activations as the tiles read them: for every segment, for every block of rows, [k/4][rows][4]; missing rows are 0.
template <class Kernel>
void pack_block(const Job& job, int64_t block, int64_t blocks, int64_t start, int64_t count,
                typename Kernel::Activation* out) {
    typename Kernel::Activation* to = out + start * blocks * Kernel::rows + block * count * Kernel::rows;
    for (int r = 0; r < Kernel::rows; ++r, to += QUAD) {
        const int64_t row = block * Kernel::rows + r;
        if (row < job.rows)
            Kernel::pack_row(job.activations + row * job.inputs + start, to, count);
        else
            for (int64_t k = 0; k < count; k += QUAD) std::memset(to + k * Kernel::rows, 0, QUAD * sizeof(*to));
    }
}

// One row of a block: every four inputs `Rows` quads apart.
template <int Rows>
void pack_bytes(const int8_t* from, int8_t* to, int64_t count) {
    for (int64_t k = 0; k < count; k += QUAD) std::memcpy(to + k * Rows, from + k, QUAD);
}

// A single row waits for memory: near weights are fetched into the first cache, far ones into the second, and scales, of
// which a group has too few lines for the hardware to see where they go, some groups ahead.
inline void fetch_weights(const uint8_t* w) {
    __builtin_prefetch(w + 1024, 0, 3);
    __builtin_prefetch(w + 4096, 0, 2);
}
inline void fetch_scale(const float* scale) { __builtin_prefetch(scale + 4 * PANEL, 0, 3); }

inline int32_t sum_of(const int8_t* values, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    return sum;
}

// out = (sum over groups of scale * (integer sum)) * activation scale + bias, for `count` rows of one panel.
inline void write_rows(const Job& job, int64_t panel, int64_t first, int64_t count, const float* totals) {
    for (int64_t r = 0; r < count; ++r) {
        float* to = job.out + (first + r) * job.channels + panel * PANEL;
        const float by = job.activation_scale[first + r];
        for (int c = 0; c < PANEL; ++c) {
            const float value = totals[r * PANEL + c] * by;
            to[c] = job.bias ? value + job.bias[panel * PANEL + c] : value;
        }
    }
}

// Packed activations, their sums by group, and which blocks of rows are meant.
template <class Kernel>
struct Rows {
    int64_t blocks, first, last;
    const typename Kernel::Activation* packed;
    const int32_t* sums;
};

// What a thread needs for a chunk of rows.
template <class Kernel>
struct Scratch {
    Buffer<typename Kernel::Expanded> expanded{Kernel::panels * PANEL * SEGMENT};
    Buffer<int32_t> acc{Kernel::panels * PANEL * ROW_CHUNK};
    Buffer<float> totals{Kernel::panels * PANEL * ROW_CHUNK};
};

// All activations of one block of rows: packed, and summed by group where the kernel needs it.
template <class Kernel>
void pack_rows(const Job& job, int64_t block, int64_t blocks, typename Kernel::Activation* packed, int32_t* sums) {
    for (int64_t g = 0; g < job.inputs / job.group; ++g) {
        for (int64_t k = g * job.group; k < (g + 1) * job.group; k += SEGMENT)
            pack_block<Kernel>(job, block, blocks, k, least(SEGMENT, (g + 1) * job.group - k), packed);
        for (int64_t row = block * Kernel::rows; row < (block + 1) * Kernel::rows; ++row)
            sums[g * blocks * Kernel::rows + row] =
                row < job.rows
                    ? Kernel::sum(job.activations + row * job.inputs + g * job.group, job.group)
                    : 0;
    }
}

// `panels` panels from this one on, at most `Panels` of them.
template <class Kernel, int Panels>
void run_panels(const Job& job, int64_t panel, int64_t panels, const Rows<Kernel>& rows, Scratch<Kernel>& scratch) {
    if constexpr (Panels > 1)
        if (panels < Panels) return run_panels<Kernel, Panels - 1>(job, panel, panels, rows, scratch);
    Kernel::template run_panels<Panels>(job, panel, rows, scratch);
}

template <class Kernel>
void run_tiles(const Job& job) {
    const int64_t blocks = (job.rows + Kernel::rows - 1) / Kernel::rows, groups = job.inputs / job.group;
    const int64_t chunk = ROW_CHUNK / Kernel::rows, panels = job.channels / PANEL;
    Buffer<typename Kernel::Activation> packed(blocks * Kernel::rows * job.inputs);
    Buffer<int32_t> sums(groups * blocks * Kernel::rows);
#pragma omp parallel num_threads(job.threads)
    {
        Scratch<Kernel> scratch;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            pack_rows<Kernel>(job, block, blocks, packed.data, sums.data);
#pragma omp for schedule(static) collapse(2)
        for (int64_t first = 0; first < blocks; first += chunk)
            for (int64_t panel = 0; panel < panels; panel += Kernel::panels)
                run_panels<Kernel, Kernel::panels>(
                    job, panel, panels - panel,
                    Rows<Kernel>{blocks, first, least(blocks, first + chunk), packed.data, sums.data}, scratch);
    }
}

// One row against `panels` panels from this one on, at most `Panels` of them.
template <class Kernel, int Panels>
void run_single_panels(const Job& job, int64_t panel, int64_t panels, const typename Kernel::Activation* row,
                       const int32_t* sums) {
    if constexpr (Panels > 1)
        if (panels < Panels) return run_single_panels<Kernel, Panels - 1>(job, panel, panels, row, sums);
    const int64_t groups = job.inputs / job.group;
    alignas(64) float totals[PANEL * Panels];
    Kernel::template single<Panels>(row, job.weights + panel * PANEL * job.inputs * Kernel::bits / 8, sums,
                                    job.scale + panel * groups * PANEL,
                                    job.offset ? job.offset + panel * PANEL : nullptr, groups, job.group, totals);
    for (int p = 0; p < Panels; ++p) write_rows(job, panel + p, 0, 1, totals + p * PANEL);
}

// One row: nothing to reuse, so the weights are read once, straight from where they lie.
template <class Kernel>
void run_single(const Job& job) {
    const int64_t groups = job.inputs / job.group, panels = job.channels / PANEL;
    Buffer<typename Kernel::Activation> row(job.inputs);
    Buffer<int32_t> sums(groups);
    for (int64_t k = 0; k < job.inputs; ++k) row.data[k] = job.activations[k];
    for (int64_t g = 0; g < groups; ++g)
        sums.data[g] = Kernel::sum(job.activations + g * job.group, job.group);
#pragma omp parallel for schedule(static) num_threads(job.threads)
    for (int64_t panel = 0; panel < panels; panel += Kernel::single_panels)
        run_single_panels<Kernel, Kernel::single_panels>(job, panel, panels - panel, row.data, sums.data);
}

template <class Kernel>
void run(const Job& job) {
    if (job.rows == 1)
        run_single<Kernel>(job);
    else
        run_tiles<Kernel>(job);
}

}  // namespace quantkit
