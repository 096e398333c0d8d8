#include "packed_linear.h"

#include <cstring>

#include "thread_pool.h"

namespace speeder::cpu {

PackedLinear::PackedLinear(const Matrix& matrix, const float* bias, Number type, bool gated, int threads,
                           const Kernels& kernels)
    : inputs_(matrix.columns),
      outputs_(matrix.rows),
      num_panels_(gated ? (matrix.rows / 2 + kPanel / 2 - 1) / (kPanel / 2) : (matrix.rows + kPanel - 1) / kPanel),
      type_(type),
      gated_(gated),
      panel_bytes_(static_cast<std::ptrdiff_t>(padded(matrix.columns)) * kPanel *
                   static_cast<std::ptrdiff_t>(bytes_of(type))),
      weights_(static_cast<std::size_t>(panel_bytes_) * static_cast<std::size_t>(num_panels_)) {
    const std::size_t columns = static_cast<std::size_t>(num_panels_) * kPanel;
    if (bias != nullptr) {
        bias_.resize(columns);
        for (std::size_t c = 0; c < columns; ++c) {
            const int row = source_row(static_cast<int>(c));
            bias_[c] = row < 0 ? 0.0f : bias[row];
        }
    }
    if (type == Number::int8) {
        scale_.resize(columns);
        sum_.resize(columns);
    }
    std::atomic<int> next{0};
    ThreadPool::shared().run(threads, [&](int) {
        for (int index; (index = next.fetch_add(1)) < num_panels_;) pack(matrix, index, kernels);
    });
}

int PackedLinear::source_row(int column) const {
    if (!gated_) return column < outputs_ ? column : -1;
    const int half = kPanel / 2, inside = column % kPanel, row = column / kPanel * half + inside % half;
    if (row >= outputs_ / 2) return -1;
    return inside < half ? row : outputs_ / 2 + row;
}

void PackedLinear::pack(const Matrix& matrix, int panel, const Kernels& kernels) {
    std::byte* out = weights_.data() + panel * panel_bytes_;
    const auto wide = static_cast<std::size_t>(padded(inputs_));
    std::vector<float> row(wide);
    std::vector<std::byte> typed(wide * bytes_of(type_));
    const std::ptrdiff_t row_bytes = static_cast<std::ptrdiff_t>(bytes_of(matrix.type)) * matrix.columns;
    for (int c = 0; c < kPanel; ++c) {
        const int column = panel * kPanel + c, source = source_row(column);
        if (source < 0) continue;
        kernels.widen(matrix.data + source * row_bytes, matrix.type, inputs_, row.data());
        if (type_ == Number::int8) quantize(row, typed, column, kernels);
        else kernels.narrow(row.data(), padded(inputs_), type_, typed.data());
        for (std::size_t step = 0; step < typed.size() / kRowStepBytes; ++step)
            std::memcpy(out + step * kStepBytes + c * kRowStepBytes, typed.data() + step * kRowStepBytes,
                        kRowStepBytes);
    }
}

// as activations are, but signed
void PackedLinear::quantize(const std::vector<float>& row, std::vector<std::byte>& typed, int column,
                            const Kernels& kernels) {
    float scale;
    kernels.quantize(row.data(), static_cast<int>(row.size()), {typed.data(), 0, &scale}, 0);
    std::int32_t sum = 0;
    for (auto& each : typed) {
        const int whole = static_cast<int>(each) - 128;
        sum += whole;
        each = static_cast<std::byte>(static_cast<std::int8_t>(whole));
    }
    scale_[static_cast<std::size_t>(column)] = scale;
    sum_[static_cast<std::size_t>(column)] = sum;
}

Panel PackedLinear::panel(int index) const {
    const std::ptrdiff_t at = std::ptrdiff_t{index} * kPanel;
    return {weights_.data() + index * panel_bytes_,
            static_cast<int>(panel_bytes_ / kStepBytes),
            scale_.empty() ? nullptr : scale_.data() + at,
            sum_.empty() ? nullptr : sum_.data() + at,
            bias_.empty() ? nullptr : bias_.data() + at};
}

}  // namespace speeder::cpu
