// The phases of a pass. All threads go through them together; within one, whoever is free takes the next piece.
#include <algorithm>

#include "decoder_parts.h"

namespace speeder::cpu {

// One thread's way through a pass.
struct Decoder::Run {
    const Shape& shape;
    const Kernels& kernels;
    const std::vector<std::unique_ptr<Layer>>& layers;
    const std::vector<float>& norm;
    const Pass& pass;
    Scratch& scratch;
    Barrier& barrier;
    int thread, threads;
    int phase = 0;

    // work(i) for all i, whichever thread; then all meet
    template <class Work>
    void each(int items, int at_once, const Work& work) {
        auto& next = scratch.counters[phase++];
        for (int begin; (begin = next.fetch_add(at_once, std::memory_order_relaxed)) < items;)
            for (int i = begin; i < std::min(items, begin + at_once); ++i) work(i);
        barrier.wait();
    }

    struct Product {
        const PackedLinear* linear;
        Rows rows;
        int num_rows;
        Target target;
    };

    // several products whose panels are taken from one list
    void multiply(std::initializer_list<Product> products) {
        int items = 0;
        for (const auto& each : products) items += pieces(each);
        this->each(items, std::clamp(items / (threads * 8), 1, 8), [&](int i) {
            for (const auto& product : products) {
                if (i < pieces(product)) return piece(product, i);
                i -= pieces(product);
            }
        });
    }

    static int pieces(const Product& product) {
        return product.linear->num_panels() * ((product.num_rows + kRowsAtOnce - 1) / kRowsAtOnce);
    }

    void piece(const Product& product, int i) const {
        const auto& linear = *product.linear;
        const int panel = i % linear.num_panels(), first = i / linear.num_panels() * kRowsAtOnce;
        const int count = std::min(kRowsAtOnce, product.num_rows - first);
        const Rows rows{product.rows.row(first), product.rows.stride, product.rows.scale + first};
        Target target = product.target;
        const auto width = static_cast<std::ptrdiff_t>(bytes_of(target.gated ? target.type : Number::fp32));
        target.out += first * target.stride + panel * linear.columns_of_panel() * width;
        kernels.product[static_cast<int>(linear.type())](linear.panel(panel), rows, count, target,
                                                         scratch.of_thread(thread));
    }

    static Target floats(float* out, std::ptrdiff_t stride) {
        return {reinterpret_cast<std::byte*>(out), stride * static_cast<std::ptrdiff_t>(sizeof(float)), false,
                Number::fp32};
    }

    bool quantized() const { return shape.weights == Number::int8; }

    void quantize(const float* wide, std::ptrdiff_t stride, int size, const Rows& out, int count) {
        each(count, 4, [&](int i) { kernels.quantize(wide + i * stride, padded(size), out, i); });
    }

    void go() {
        begin();
        const int last = static_cast<int>(layers.size()) - 1;
        for (int index = 0; index < last; ++index) layer(index, false);
        layer(last, true);
    }

    void begin() {
        each(pass.num_rows, 4, [&](int i) {
            float* sum = scratch.sum + i * scratch.sum_stride;
            const auto row_bytes = static_cast<std::ptrdiff_t>(bytes_of(pass.rows_type)) * shape.hidden;
            kernels.widen(pass.rows + i * row_bytes, pass.rows_type, shape.hidden, sum);
            for (int c = shape.hidden; c < padded(shape.hidden); ++c) sum[c] = 0.0f;
            kernels.add_norm(sum, sum, nullptr, layers[0]->input_norm.data(), shape.eps, shape.hidden, shape.weights,
                             scratch.normed, i);
        });
    }

    // the last layer computes outputs of the rows that are read, and keys and values of all
    void layer(int index, bool last) {
        const Layer& layer = *layers[static_cast<std::size_t>(index)];
        const std::int64_t* rows = pass.read_rows;
        const int count = last ? pass.num_reads : pass.num_rows;
        const Rows& asking = last ? scratch.normed_read : scratch.normed;
        if (last) gather(rows, count);
        multiply({{&layer.q, asking, count, floats(scratch.q, scratch.q_stride)},
                  {&layer.kv, scratch.normed, pass.num_rows, floats(scratch.kv, scratch.kv_stride)}});
        turn(layer, index, last, count);
        attend(index, count, last ? scratch.read : scratch.all);
        multiply({{&layer.out, scratch.attended, count, floats(scratch.x, scratch.x_stride)}});
        float* sums = last ? scratch.sum_read : scratch.sum;
        each(count, 4, [&](int i) {
            const float* residual = scratch.sum + (last ? rows[i] : i) * scratch.sum_stride;
            kernels.add_norm(sums + i * scratch.sum_stride, residual, scratch.x + i * scratch.x_stride,
                             layer.post_norm.data(), shape.eps, shape.hidden, shape.weights, scratch.normed, i);
        });
        feed_forward(layer, count);
        if (last) finish(count);
        else follow(index + 1, count);
    }

    void gather(const std::int64_t* rows, int count) {
        const auto bytes = static_cast<std::size_t>(padded(shape.hidden)) * bytes_of(shape.weights);
        each(count, 8, [&](int i) {
            std::memcpy(scratch.normed_read.row(i), scratch.normed.row(rows[i]), bytes);
            scratch.normed_read.scale[i] = scratch.normed.scale[rows[i]];
        });
    }

    // norms of heads and rotation; keys and values go where later rows, and this one itself, look for them
    void turn(const Layer& layer, int index, bool last, int count) {
        const int dim = shape.head_dim;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
        each(count + pass.num_rows, 4, [&](int i) {
            const bool asks = i < count;
            const std::int64_t row = asks ? (last ? pass.read_rows[i] : i) : i - count;
            const float* cos = pass.cos + pass.positions[row] * dim;
            const float* sin = pass.sin + pass.positions[row] * dim;
            if (!asks) return store(layer, index, static_cast<int>(row), cos, sin);
            float* q = scratch.q + i * scratch.q_stride;
            const float* q_norm = layer.q_norm.empty() ? nullptr : layer.q_norm.data();
            for (int h = 0; h < shape.heads; ++h)
                kernels.turn(q + h * dim, q_norm, shape.eps, cos, sin, dim, scale, q + h * dim);
        });
    }

    void store(const Layer& layer, int index, int row, const float* cos, const float* sin) {
        const int dim = shape.head_dim, size = shape.kv_heads * dim;
        const auto bytes = static_cast<std::ptrdiff_t>(bytes_of(shape.cache)) * size;
        float* k = scratch.kv + row * scratch.kv_stride;
        const float* k_norm = layer.k_norm.empty() ? nullptr : layer.k_norm.data();
        for (int h = 0; h < shape.kv_heads; ++h)
            kernels.turn(k + h * dim, k_norm, shape.eps, cos, sin, dim, 1.0f, k + h * dim);
        const std::int64_t slot = row < pass.num_mapped ? pass.slot_mapping[row] : -1;
        if (slot >= 0) {
            kernels.narrow(k, size, shape.cache, pass.keys + index * pass.layer_bytes + slot * bytes);
            kernels.narrow(k + size, size, shape.cache, pass.values + index * pass.layer_bytes + slot * bytes);
        }
        if (pass.candidate[row] || row >= pass.num_rows - pass.num_pathed) {
            const std::int64_t own = pass.own_slots == nullptr ? row : pass.own_slots[row];
            kernels.narrow(k, size, shape.cache, own_keys(index) + own * bytes);
            kernels.narrow(k + size, size, shape.cache, own_values(index) + own * bytes);
        }
    }

    std::byte* own_keys(int index) const {
        return pass.own_slots == nullptr ? scratch.own_keys : pass.own_keys + index * pass.own_layer_bytes;
    }
    std::byte* own_values(int index) const {
        return pass.own_slots == nullptr ? scratch.own_values : pass.own_values + index * pass.own_layer_bytes;
    }

    void attend(int index, int count, const Attending& attending) {
        const int units = static_cast<int>(attending.chunks.size()) * shape.kv_heads;
        each(units, 1, [&](int i) {
            unit(index, attending, attending.chunks[static_cast<std::size_t>(i / shape.kv_heads)], i % shape.kv_heads);
        });
        if (quantized())
            quantize(scratch.wide_attended, scratch.wide_attended_stride, shape.heads * shape.head_dim,
                     scratch.attended, count);
    }

    void unit(int index, const Attending& attending, const Chunk& chunk, int kv_head) const {
        const int dim = shape.head_dim, group = shape.heads / shape.kv_heads;
        const auto cache_bytes = static_cast<std::ptrdiff_t>(bytes_of(shape.cache));
        const std::ptrdiff_t slot = cache_bytes * shape.kv_heads * dim, head = cache_bytes * kv_head * dim;
        const Number type = quantized() ? Number::fp32 : shape.weights;
        const auto out_bytes = static_cast<std::ptrdiff_t>(bytes_of(type));
        const std::ptrdiff_t stride =
            quantized() ? scratch.wide_attended_stride * out_bytes : scratch.attended.stride;
        std::byte* out = quantized() ? reinterpret_cast<std::byte*>(scratch.wide_attended) : scratch.attended.data;
        kernels.attend({
            .q = scratch.q + chunk.first * scratch.q_stride + kv_head * group * dim,
            .q_stride = scratch.q_stride,
            .num_rows = chunk.count,
            .group = group,
            .dim = dim,
            .num_keys = chunk.num_keys,
            .slots = attending.slots.data() + chunk.slots,
            .keys = pass.keys + index * pass.layer_bytes + head,
            .values = pass.values + index * pass.layer_bytes + head,
            .slot_stride = slot,
            .type = shape.cache,
            .limit = attending.limit.data() + chunk.first,
            .path = attending.path.data() + chunk.first,
            .path_length = attending.path_length.data() + chunk.first,
            .own_keys = own_keys(index) + head,
            .own_values = own_values(index) + head,
            .out = out + chunk.first * stride + kv_head * group * dim * out_bytes,
            .out_stride = stride,
            .out_type = type,
            .work = reinterpret_cast<float*>(scratch.of_thread(thread)),
        });
    }

    void feed_forward(const Layer& layer, int count) {
        Target target{scratch.gated.data, scratch.gated.stride, true, shape.weights};
        if (quantized())
            target = {reinterpret_cast<std::byte*>(scratch.wide_gated),
                      scratch.wide_gated_stride * static_cast<std::ptrdiff_t>(sizeof(float)), true, Number::fp32};
        multiply({{&layer.gate_up, scratch.normed, count, target}});
        if (quantized())
            quantize(scratch.wide_gated, scratch.wide_gated_stride, shape.intermediate, scratch.gated, count);
        multiply({{&layer.down, scratch.gated, count, floats(scratch.x, scratch.x_stride)}});
    }

    // the sum behind a layer, and the next one's norm of it
    void follow(int next, int count) {
        const float* weight = layers[static_cast<std::size_t>(next)]->input_norm.data();
        each(count, 4, [&](int i) {
            float* sum = scratch.sum + i * scratch.sum_stride;
            kernels.add_norm(sum, sum, scratch.x + i * scratch.x_stride, weight, shape.eps, shape.hidden,
                             shape.weights, scratch.normed, i);
        });
    }

    void finish(int count) {
        const auto out_bytes = static_cast<std::ptrdiff_t>(bytes_of(pass.out_type)) * shape.hidden;
        each(count, 4, [&](int i) {
            float* sum = scratch.sum_read + i * scratch.sum_stride;
            const Rows last{scratch.of_thread(thread), 0, nullptr};
            kernels.add_norm(sum, sum, scratch.x + i * scratch.x_stride, norm.data(), shape.eps, shape.hidden,
                             Number::fp32, last, 0);
            kernels.narrow(reinterpret_cast<const float*>(last.data), shape.hidden, pass.out_type,
                           pass.out + i * out_bytes);
        });
    }
};

void Decoder::run(const Pass& pass) {
    auto& scratch = *scratch_;
    const double work = 2.0 * pass.num_rows * static_cast<double>(weight_bytes()) /
                        static_cast<double>(bytes_of(shape_.weights));
    const int threads = static_cast<int>(std::clamp(work / work_per_thread_, 1.0, static_cast<double>(threads_)));
    const int phases = 2 + 12 * num_layers();
    if (phases > scratch.num_counters) {
        scratch.counters = std::make_unique<std::atomic<int>[]>(static_cast<std::size_t>(phases));
        scratch.num_counters = phases;
    }
    for (int i = 0; i < phases; ++i) scratch.counters[static_cast<std::size_t>(i)].store(0, std::memory_order_relaxed);
    Barrier barrier(threads);
    ThreadPool::shared().run(threads, [&](int thread) {
        Run{shape_, kernels_, layers_, norm_, pass, scratch, barrier, thread, threads}.go();
    });
}

}  // namespace speeder::cpu
