// A linear layer's weights in panels of 32 columns, as `Kernels::product` reads them.
#pragma once

#include <atomic>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace speeder::cpu {

// A matrix [rows, columns] of fp32 or bf16 as torch has it: one output a row.
struct Matrix {
    const std::byte* data;
    Number type;
    int rows, columns;
};

class PackedLinear {
public:
    // gated: `matrix` is [gate; up], which the panels interleave so that silu(gate) * up ends in one of them.
    // bias: fp32 [rows] or null. int8: one scale an output, from its largest weight.
    PackedLinear(const Matrix& matrix, const float* bias, Number type, bool gated, int threads, const Kernels& kernels);

    int inputs() const { return inputs_; }
    int outputs() const { return gated_ ? outputs_ / 2 : outputs_; }
    int num_panels() const { return num_panels_; }
    bool gated() const { return gated_; }
    Number type() const { return type_; }
    int columns_of_panel() const { return gated_ ? kPanel / 2 : kPanel; }
    std::size_t bytes() const { return weights_.bytes(); }

    Panel panel(int index) const;

private:
    int source_row(int column) const;  // -1 for padding
    void pack(const Matrix& matrix, int panel, const Kernels& kernels);
    void quantize(const std::vector<float>& row, std::vector<std::byte>& typed, int column, const Kernels& kernels);

    int inputs_, outputs_, num_panels_;
    Number type_;
    bool gated_;
    std::ptrdiff_t panel_bytes_;
    Buffer weights_;
    std::vector<float> bias_, scale_;
    std::vector<std::int32_t> sum_;
};

}  // namespace speeder::cpu
