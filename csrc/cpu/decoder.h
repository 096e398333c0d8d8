// A whole pass of a decoder over flat rows: products from packed weights, and all that stands between them.
//
// Pre-norm attention and SwiGLU (Llama, Mistral, Qwen2, Qwen3). Sums between layers are kept in fp32; products take
// rows in the weights' type. Which keys a row sees: the shared ones, the first `visible` of its sequence's blocks, and
// its own path (a candidate: itself; text: its ancestors and itself).
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "packed_linear.h"

namespace speeder::cpu {

struct Shape {
    int hidden, heads, kv_heads, head_dim, intermediate;
    float eps;
    Number weights;  // of the packed products
    Number cache;    // of keys and values: fp32 or bf16
};

// As torch has them; biases and norms fp32, null where the family has none.
struct LayerWeights {
    Matrix qkv, out, gate_up, down;
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
    const float *input_norm, *post_norm, *q_norm, *k_norm;
};

struct Pass {
    int num_rows;
    const std::byte* rows;  // [num_rows, hidden]
    Number rows_type;
    const std::int64_t* positions;      // [num_rows] into cos and sin
    const float *cos, *sin;             // [num_positions, head_dim]
    std::int64_t num_positions;
    const std::int64_t* slot_mapping;   // [num_mapped] where a row's keys go in the cache, -1 for nowhere
    int num_mapped;
    const std::int64_t* sequence;       // [num_rows], rows of one sequence side by side
    const std::int64_t* visible;        // [num_rows]
    const bool* candidate;              // [num_rows] its path is itself
    const std::int64_t* paths;          // [num_pathed, path_width] of the last rows, -1 for none: own slots
    int num_pathed, path_width;
    const std::int64_t* block_tables;   // [sequences, table_width]
    int table_width, num_sequences;
    const std::int64_t* shared_blocks;
    int shared_len, block_size;
    std::byte *keys, *values;           // [layers, blocks, block_size, kv_heads, head_dim]
    std::ptrdiff_t layer_bytes;
    const std::int64_t* own_slots;      // [num_rows] or null: own keys are kept elsewhere than in this pass's scratch
    std::byte *own_keys, *own_values;   // [layers, slots, kv_heads, head_dim], with own_slots
    std::ptrdiff_t own_layer_bytes;
    const std::int64_t* read_rows;      // [num_reads]
    int num_reads;
    std::byte* out;                     // [num_reads, hidden] under the last norm
    Number out_type;
};

class Decoder {
public:
    Decoder(const Shape& shape, const Kernels& kernels, int threads);
    ~Decoder();

    void add_layer(const LayerWeights& weights);
    void set_norm(const float* weight);  // the last one, [hidden]

    // Throws std::invalid_argument for indices that point nowhere, before anything is written.
    void forward(const Pass& pass);

    int num_layers() const { return static_cast<int>(layers_.size()); }
    std::size_t weight_bytes() const;
    std::size_t scratch_bytes() const;  // held for the next pass
    int threads() const { return threads_; }
    void set_threads(int threads) { threads_ = threads; }
    // What a pass of more rows needed is given back behind it: it may have been the only one.
    int kept_rows() const { return kept_rows_; }
    void set_kept_rows(int rows) { kept_rows_ = rows; }
    // Operations that are worth another thread: waking one takes tens of microseconds where all cores are idle, and
    // milliseconds where they are not.
    double work_per_thread() const { return work_per_thread_; }
    void set_work_per_thread(double operations) { work_per_thread_ = operations; }

private:
    struct Layer;
    struct Scratch;
    struct Run;

    void run(const Pass& pass);  // checked, its buffers reserved

    const Shape shape_;
    const Kernels& kernels_;
    int threads_;
    int kept_rows_ = std::numeric_limits<int>::max();
    double work_per_thread_ = 2e7;
    std::vector<std::unique_ptr<Layer>> layers_;
    std::vector<float> norm_;
    std::unique_ptr<Scratch> scratch_;
};

}  // namespace speeder::cpu
