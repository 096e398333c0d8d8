// What a decoder's pass is made of, shared by its two files: layers, buffers, the units of attention.
#pragma once

#include <atomic>
#include <cstring>

#include "decoder.h"
#include "thread_pool.h"

namespace speeder::cpu {

struct Decoder::Layer {
    Layer(const Shape& shape, const LayerWeights& weights, int threads, const Kernels& kernels);

    PackedLinear q, kv, out, gate_up, down;
    std::vector<float> input_norm, post_norm, q_norm, k_norm;
};

// Rows of one sequence that attend together, and the keys the furthest-seeing of them sees.
struct Chunk {
    int first, count;  // of a list of rows
    int num_keys;
    std::size_t slots;  // where its keys' slots begin
};

// Chunks of the rows that attend in a layer: all, or in the last one those that are read.
struct Attending {
    std::vector<Chunk> chunks;
    std::vector<std::int64_t> slots;
    std::vector<int> limit, path_length;         // by place in the list
    std::vector<const std::int64_t*> path;
    int max_keys = 0, max_path = 0;

    void build(const Pass& pass, const std::int64_t* rows, int count, const std::vector<std::int64_t>& own_paths,
               const std::vector<std::size_t>& path_starts);
};

// Buffers that grow and stay: a pass no larger than an earlier one allocates nothing.
struct Decoder::Scratch {
    void reserve(const Shape& shape, int num_rows, int threads, int max_keys, int max_path);

    int capacity = 0, threads = 0, max_keys = 0, max_path = 0;
    Buffer memory, work;
    float *sum, *sum_read, *q, *kv, *x, *wide_attended, *wide_gated;
    Rows normed, normed_read, attended, gated;
    std::byte *own_keys, *own_values;
    std::ptrdiff_t sum_stride, x_stride, q_stride, kv_stride, wide_attended_stride, wide_gated_stride;  // floats
    std::size_t work_stride;  // bytes a thread
    Attending all, read;
    std::vector<std::int64_t> own_paths;
    std::vector<std::size_t> path_starts;
    std::unique_ptr<std::atomic<int>[]> counters;
    int num_counters = 0;

    std::byte* of_thread(int thread) const { return work.data() + static_cast<std::size_t>(thread) * work_stride; }
};

constexpr int kRowsAtOnce = 192;  // of a product: as many as stay in the second cache beside a panel

}  // namespace speeder::cpu
