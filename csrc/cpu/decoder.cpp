#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "decoder_parts.h"

namespace speeder::cpu {

namespace {

std::vector<float> padded_copy(const float* values, int size) {
    if (values == nullptr) return {};
    std::vector<float> copy(static_cast<std::size_t>(padded(size)), 0.0f);
    std::copy_n(values, size, copy.begin());
    return copy;
}

Matrix part(const Matrix& matrix, int first, int rows) {
    const std::size_t skipped = static_cast<std::size_t>(first) * static_cast<std::size_t>(matrix.columns);
    return {matrix.data + skipped * bytes_of(matrix.type), matrix.type, rows, matrix.columns};
}

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

void check_indices(const Pass& pass, std::int64_t num_blocks, std::int64_t num_own) {
    for (int i = 0; i < pass.num_rows; ++i) {
        require(pass.positions[i] >= 0 && pass.positions[i] < pass.num_positions, "positions: beyond cos and sin");
        require(pass.sequence[i] >= 0 && pass.sequence[i] < pass.num_sequences, "sequence: beyond the block tables");
        require(pass.visible[i] >= 0 && pass.visible[i] <= std::int64_t{pass.table_width} * pass.block_size,
                "visible: more than the blocks hold");
        require(pass.own_slots == nullptr || (pass.own_slots[i] >= 0 && pass.own_slots[i] < num_own),
                "own_slots: out of range");
    }
    for (int i = 0; i < pass.num_mapped; ++i)
        require(pass.slot_mapping[i] < num_blocks * pass.block_size, "slot_mapping: beyond the cache");
    for (std::int64_t i = 0; i < std::int64_t{pass.num_sequences} * pass.table_width; ++i)
        require(pass.block_tables[i] >= 0 && pass.block_tables[i] < num_blocks, "block_tables: beyond the cache");
    for (int i = 0; i < (pass.shared_len + pass.block_size - 1) / pass.block_size; ++i)
        require(pass.shared_blocks[i] >= 0 && pass.shared_blocks[i] < num_blocks, "shared_blocks: beyond the cache");
    const std::int64_t most = pass.own_slots == nullptr ? pass.num_rows : num_own;
    for (std::int64_t i = 0; i < std::int64_t{pass.num_pathed} * pass.path_width; ++i)
        require(pass.paths[i] < most, "paths: out of range");
    for (int i = 0; i < pass.num_reads; ++i)
        require(pass.read_rows[i] >= 0 && pass.read_rows[i] < pass.num_rows, "read_rows: out of range");
}

}  // namespace

Decoder::Layer::Layer(const Shape& shape, const LayerWeights& weights, int threads, const Kernels& kernels)
    : q(part(weights.qkv, 0, shape.heads * shape.head_dim), weights.qkv_bias, shape.weights, false, threads, kernels),
      kv(part(weights.qkv, shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim),
         weights.qkv_bias == nullptr ? nullptr : weights.qkv_bias + shape.heads * shape.head_dim, shape.weights, false,
         threads, kernels),
      out(weights.out, weights.out_bias, shape.weights, false, threads, kernels),
      gate_up(weights.gate_up, weights.gate_up_bias, shape.weights, true, threads, kernels),
      down(weights.down, weights.down_bias, shape.weights, false, threads, kernels),
      input_norm(padded_copy(weights.input_norm, shape.hidden)),
      post_norm(padded_copy(weights.post_norm, shape.hidden)),
      q_norm(padded_copy(weights.q_norm, shape.head_dim)),
      k_norm(padded_copy(weights.k_norm, shape.head_dim)) {}

Decoder::Decoder(const Shape& shape, const Kernels& kernels, int threads)
    : shape_(shape), kernels_(kernels), threads_(std::max(1, threads)), scratch_(std::make_unique<Scratch>()) {}

Decoder::~Decoder() = default;

void Decoder::add_layer(const LayerWeights& weights) {
    layers_.push_back(std::make_unique<Layer>(shape_, weights, threads_, kernels_));
}

void Decoder::set_norm(const float* weight) { norm_ = padded_copy(weight, shape_.hidden); }

std::size_t Decoder::weight_bytes() const {
    std::size_t bytes = 0;
    for (const auto& layer : layers_)
        for (const auto* linear : {&layer->q, &layer->kv, &layer->out, &layer->gate_up, &layer->down})
            bytes += linear->bytes();
    return bytes;
}

std::size_t Decoder::scratch_bytes() const { return scratch_->memory.bytes() + scratch_->work.bytes(); }

void Attending::build(const Pass& pass, const std::int64_t* rows, int count, const std::vector<std::int64_t>& own_paths,
                      const std::vector<std::size_t>& path_starts) {
    chunks.clear(), slots.clear(), limit.clear(), path_length.clear(), path.clear();
    max_keys = max_path = 0;
    const auto row_at = [&](int i) { return rows == nullptr ? std::size_t(i) : std::size_t(rows[i]); };
    for (int i = 0; i < count; ++i) {
        const std::size_t row = row_at(i);
        limit.push_back(pass.shared_len + static_cast<int>(pass.visible[row]));
        path_length.push_back(static_cast<int>(path_starts[row + 1] - path_starts[row]));
        path.push_back(own_paths.data() + path_starts[row]);
        max_path = std::max(max_path, path_length.back());
        const bool joins = !chunks.empty() && chunks.back().count < kChunkRows &&
                           pass.sequence[row_at(chunks.back().first)] == pass.sequence[row];
        if (!joins) chunks.push_back({i, 0, 0, 0});
        ++chunks.back().count;
        chunks.back().num_keys = std::max(chunks.back().num_keys, limit.back());
        max_keys = std::max(max_keys, limit.back());
    }
    for (auto& chunk : chunks) {
        chunk.slots = slots.size();
        const std::int64_t* table = pass.block_tables + pass.sequence[row_at(chunk.first)] * pass.table_width;
        for (int j = 0; j < chunk.num_keys; ++j) {
            const int at = j < pass.shared_len ? j : j - pass.shared_len;
            const std::int64_t block = (j < pass.shared_len ? pass.shared_blocks : table)[at / pass.block_size];
            slots.push_back(block * pass.block_size + at % pass.block_size);
        }
    }
}

void Decoder::Scratch::reserve(const Shape& shape, int num_rows, int threads_now, int keys, int path) {
    if (num_rows > capacity) {
        const int grown = (num_rows + 63) / 64 * 64;
        const auto rows = static_cast<std::size_t>(grown);
        std::size_t used = 0;
        const auto take = [&](std::size_t bytes) {
            const std::size_t at = used;
            used += (bytes * rows + 63) / 64 * 64;
            return at;
        };
        // not a multiple of a page: rows that many bytes apart would share one place in the first cache
        const auto width = [](int size) { return padded(size) + 16; };
        const auto typed = [&](int size) { return padded(size) * bytes_of(shape.weights) + 64; };
        const int q_size = shape.heads * shape.head_dim, kv_size = 2 * shape.kv_heads * shape.head_dim;
        const bool quantized = shape.weights == Number::int8;
        // a row's norm stands behind its sum before it is quantized
        sum_stride = quantized ? 2 * padded(shape.hidden) + 16 : width(shape.hidden);
        x_stride = width(shape.hidden), q_stride = width(q_size), kv_stride = width(kv_size);
        wide_attended_stride = width(q_size), wide_gated_stride = width(shape.intermediate);
        // where each begins, before there is memory for any
        const auto floats = [&](std::size_t each) { return take(each * sizeof(float)); };
        const std::size_t sum_at = floats(sum_stride), sum_read_at = floats(sum_stride), q_at = floats(q_stride);
        const std::size_t kv_at = floats(kv_stride), x_at = floats(x_stride);
        const std::size_t wide_attended_at = floats(quantized ? wide_attended_stride : 0);
        const std::size_t wide_gated_at = floats(quantized ? wide_gated_stride : 0);
        struct Typed {
            int size;
            std::size_t data, scale;
        };
        const auto typed_at = [&](int size) { return Typed{size, take(typed(size)), floats(1)}; };
        const Typed normed_at = typed_at(shape.hidden), normed_read_at = typed_at(shape.hidden);
        const Typed attended_at = typed_at(q_size), gated_at = typed_at(shape.intermediate);
        const std::size_t own_bytes = kv_size / 2 * bytes_of(shape.cache);
        const std::size_t own_keys_at = take(own_bytes), own_values_at = take(own_bytes);

        memory = Buffer(used);
        capacity = grown;  // not before there is room for it
        std::byte* base = memory.data();
        const auto number = [&](std::size_t at) { return reinterpret_cast<float*>(base + at); };
        const auto typed_rows = [&](const Typed& at) {
            return Rows{base + at.data, static_cast<std::ptrdiff_t>(typed(at.size)), number(at.scale)};
        };
        sum = number(sum_at), sum_read = number(sum_read_at), q = number(q_at), kv = number(kv_at), x = number(x_at);
        wide_attended = number(wide_attended_at), wide_gated = number(wide_gated_at);
        normed = typed_rows(normed_at), normed_read = typed_rows(normed_read_at);
        attended = typed_rows(attended_at), gated = typed_rows(gated_at);
        own_keys = base + own_keys_at, own_values = base + own_values_at;
    }
    if (threads_now > threads || keys > max_keys || path > max_path) {
        const int more_threads = std::max(threads, threads_now);
        const int more_keys = std::max(max_keys, keys + 64), longer = std::max(max_path, path);
        const std::size_t attention =
            attention_work(shape.heads / shape.kv_heads, shape.head_dim, more_keys, longer) * sizeof(float);
        const std::size_t products = static_cast<std::size_t>(kRowsAtOnce) * kPanel * 4;
        const std::size_t last = static_cast<std::size_t>(padded(shape.hidden)) * sizeof(float);
        const std::size_t stride = (std::max({attention, products, last}) + 4095) / 4096 * 4096;
        work = Buffer(stride * static_cast<std::size_t>(more_threads));
        work_stride = stride, threads = more_threads, max_keys = more_keys, max_path = longer;
    }
}

void Decoder::forward(const Pass& pass) {
    require(!layers_.empty() && !norm_.empty(), "a decoder without layers or without its last norm");
    const std::int64_t block_bytes = std::int64_t{pass.block_size} * shape_.kv_heads * shape_.head_dim *
                                     static_cast<std::int64_t>(bytes_of(shape_.cache));
    const std::int64_t own_bytes = block_bytes / pass.block_size;
    check_indices(pass, pass.layer_bytes / block_bytes, pass.own_layer_bytes / own_bytes);
    auto& scratch = *scratch_;
    auto& paths = scratch.own_paths;
    auto& starts = scratch.path_starts;
    paths.clear(), starts.assign(1, 0);
    for (int row = 0; row < pass.num_rows; ++row) {
        const int pathed = row - (pass.num_rows - pass.num_pathed);
        if (pathed >= 0) {
            const std::int64_t* path = pass.paths + std::int64_t{pathed} * pass.path_width;
            for (int p = 0; p < pass.path_width; ++p)
                if (path[p] >= 0) paths.push_back(path[p]);
        } else if (pass.candidate[row]) {
            paths.push_back(pass.own_slots == nullptr ? row : pass.own_slots[row]);
        }
        starts.push_back(paths.size());
    }
    scratch.all.build(pass, nullptr, pass.num_rows, paths, starts);
    scratch.read.build(pass, pass.read_rows, pass.num_reads, paths, starts);
    scratch.reserve(shape_, pass.num_rows, threads_, scratch.all.max_keys, scratch.all.max_path);
    run(pass);
    if (pass.num_rows > kept_rows_) scratch_ = std::make_unique<Scratch>();
}

}  // namespace speeder::cpu
