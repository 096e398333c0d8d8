#include "packed_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "thread_pool.h"

namespace speeder::cpu {

namespace {

float weight_at(const Matrix& matrix, int row, int column) {
    const std::size_t at = static_cast<std::size_t>(row) * static_cast<std::size_t>(matrix.columns) +
                           static_cast<std::size_t>(column);
    if (matrix.type == Number::fp32) return reinterpret_cast<const float*>(matrix.data)[at];
    const std::uint32_t bits = static_cast<std::uint32_t>(reinterpret_cast<const std::uint16_t*>(matrix.data)[at]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint16_t to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

PackedLinear::PackedLinear(const Matrix& matrix, const float* bias, Number type, bool gated, int threads)
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
        for (int index; (index = next.fetch_add(1)) < num_panels_;) pack(matrix, index);
    });
}

int PackedLinear::source_row(int column) const {
    if (!gated_) return column < outputs_ ? column : -1;
    const int half = kPanel / 2, inside = column % kPanel, row = column / kPanel * half + inside % half;
    if (row >= outputs_ / 2) return -1;
    return inside < half ? row : outputs_ / 2 + row;
}

void PackedLinear::pack(const Matrix& matrix, int panel) {
    std::byte* out = weights_.data() + panel * panel_bytes_;
    const int each = kRowStepBytes / static_cast<int>(bytes_of(type_));  // inputs a step
    for (int c = 0; c < kPanel; ++c) {
        const int column = panel * kPanel + c, row = source_row(column);
        if (row < 0) continue;
        float scale = 1.0f;
        if (type_ == Number::int8) {
            float largest = 0.0f;
            for (int k = 0; k < inputs_; ++k) largest = std::max(largest, std::abs(weight_at(matrix, row, k)));
            scale = largest > 0.0f ? largest / 127.0f : 1.0f;
            scale_[static_cast<std::size_t>(column)] = scale;
        }
        std::int32_t sum = 0;
        for (int k = 0; k < inputs_; ++k) {
            const std::ptrdiff_t at = std::ptrdiff_t{k / each} * kPanel * each + c * each + k % each;
            const float weight = weight_at(matrix, row, k);
            if (type_ == Number::fp32) {
                reinterpret_cast<float*>(out)[at] = weight;
            } else if (type_ == Number::bf16) {
                reinterpret_cast<std::uint16_t*>(out)[at] = to_bf16(weight);
            } else {
                const auto whole = static_cast<std::int32_t>(std::lrint(weight / scale));
                reinterpret_cast<std::int8_t*>(out)[at] = static_cast<std::int8_t>(whole);
                sum += whole;
            }
        }
        if (type_ == Number::int8) sum_[static_cast<std::size_t>(column)] = sum;
    }
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
