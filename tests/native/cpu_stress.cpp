// Random passes and searches through the native CPU path, for the sanitizers:
//     make sanitize
// Shapes, types, sequences, candidates and paths are drawn anew; every pass is run on one thread and on three and must
// give the same bits, and leave everything but its own slots of the cache alone.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "decoder.h"
#include "top_scores.h"

namespace {

using namespace speeder::cpu;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "cpu_stress: %s\n", what);
    std::abort();
}

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int within(int least, int most) { return std::uniform_int_distribution<int>(least, most)(engine_); }
    std::vector<float> floats(std::size_t count, float scale = 1.0f) {
        std::vector<float> found(count);
        std::normal_distribution<float> draw(0.0f, scale);
        for (auto& each : found) each = draw(engine_);
        return found;
    }

private:
    std::mt19937 engine_;
};

std::size_t product(std::initializer_list<int> sizes) {
    std::size_t found = 1;
    for (int size : sizes) found *= static_cast<std::size_t>(size);
    return found;
}

Matrix matrix(const std::vector<float>& values, int rows, int columns) {
    return {reinterpret_cast<const std::byte*>(values.data()), Number::fp32, rows, columns};
}

std::unique_ptr<Decoder> make_decoder(Random& random, const Shape& shape, const Kernels& kernels, int layers) {
    auto decoder = std::make_unique<Decoder>(shape, kernels, 3);
    const int q = shape.heads * shape.head_dim, qkv = q + 2 * shape.kv_heads * shape.head_dim;
    for (int i = 0; i < layers; ++i) {
        const auto w_qkv = random.floats(product({qkv, shape.hidden}), 0.2f);
        const auto w_out = random.floats(product({shape.hidden, q}), 0.2f);
        const auto w_gate = random.floats(product({2 * shape.intermediate, shape.hidden}), 0.2f);
        const auto w_down = random.floats(product({shape.hidden, shape.intermediate}), 0.2f);
        const auto bias = random.floats(static_cast<std::size_t>(qkv));
        const auto norm = random.floats(static_cast<std::size_t>(shape.hidden));
        const auto head_norm = random.floats(static_cast<std::size_t>(shape.head_dim));
        const bool normed = random.within(0, 1) == 1, biased = random.within(0, 1) == 1;
        decoder->add_layer({matrix(w_qkv, qkv, shape.hidden), matrix(w_out, shape.hidden, q),
                            matrix(w_gate, 2 * shape.intermediate, shape.hidden),
                            matrix(w_down, shape.hidden, shape.intermediate), biased ? bias.data() : nullptr, nullptr,
                            nullptr, nullptr, norm.data(), norm.data(), normed ? head_norm.data() : nullptr,
                            normed ? head_norm.data() : nullptr});
    }
    decoder->set_norm(random.floats(static_cast<std::size_t>(shape.hidden)).data());
    return decoder;
}

// Rows of some sequences: new history, candidates, at last text that sees its path.
struct Drawn {
    static constexpr int kBlock = 3, kWidth = 5, kBlocks = 64;
    std::vector<std::int64_t> positions, slots, sequence, visible, tables, paths, reads, shared{0, 1};
    std::vector<char> candidate;  // a vector of bool has no address
    int num_pathed = 0, width = 2, sequences;

    explicit Drawn(Random& random) : sequences(random.within(1, 5)) {
        for (int s = 0; s < sequences; ++s) {
            for (int b = 0; b < kWidth; ++b) tables.push_back(2 + s * kWidth + b);
            const int history = random.within(0, kBlock * kWidth), cached = random.within(0, history);
            for (int i = cached; i < history; ++i)
                add(s, i, i + 1, block(s, i) * kBlock + i % kBlock, false);
            for (int c = random.within(0, 20); c > 0; --c) add(s, history, history, -1, true);
        }
        num_pathed = random.within(0, 4);
        const int first = static_cast<int>(positions.size());
        for (int t = 0; t < num_pathed; ++t) {
            add(sequences - 1, t, 1, -1, false);
            paths.push_back(first + t);
            paths.push_back(t > 0 ? first + t - 1 : -1);
        }
        for (std::size_t i = 0; i < positions.size(); ++i)
            if (random.within(0, 2) > 0) reads.push_back(static_cast<std::int64_t>(i));
    }

    std::int64_t block(int s, int i) const { return tables[static_cast<std::size_t>(s * kWidth + i / kBlock)]; }

    void add(int s, int position, int sees, std::int64_t slot, bool is_candidate) {
        positions.push_back(position), sequence.push_back(s), visible.push_back(sees);
        slots.push_back(slot), candidate.push_back(is_candidate ? 1 : 0);
    }
};

std::vector<std::byte> run(Decoder& decoder, const Drawn& drawn, const Shape& shape, const std::vector<float>& rows,
                           const std::vector<float>& angles, std::vector<std::byte>& keys,
                           std::vector<std::byte>& values, int threads) {
    std::vector<std::byte> out(drawn.reads.size() * static_cast<std::size_t>(shape.hidden) * 4);
    decoder.set_threads(threads);
    decoder.set_work_per_thread(1.0);
    decoder.forward({
        .num_rows = static_cast<int>(drawn.positions.size()),
        .rows = reinterpret_cast<const std::byte*>(rows.data()),
        .rows_type = Number::fp32,
        .positions = drawn.positions.data(),
        .cos = angles.data(),
        .sin = angles.data(),
        .num_positions = static_cast<std::int64_t>(angles.size()) / shape.head_dim,
        .slot_mapping = drawn.slots.data(),
        .num_mapped = static_cast<int>(drawn.positions.size()),
        .sequence = drawn.sequence.data(),
        .visible = drawn.visible.data(),
        .candidate = reinterpret_cast<const bool*>(drawn.candidate.data()),
        .paths = drawn.paths.data(),
        .num_pathed = drawn.num_pathed,
        .path_width = drawn.width,
        .block_tables = drawn.tables.data(),
        .table_width = Drawn::kWidth,
        .num_sequences = drawn.sequences,
        .shared_blocks = drawn.shared.data(),
        .shared_len = 5,
        .block_size = Drawn::kBlock,
        .keys = keys.data(),
        .values = values.data(),
        .layer_bytes = static_cast<std::ptrdiff_t>(keys.size()) / decoder.num_layers(),
        .own_slots = nullptr,
        .own_keys = nullptr,
        .own_values = nullptr,
        .own_layer_bytes = 0,
        .read_rows = drawn.reads.data(),
        .num_reads = static_cast<int>(drawn.reads.size()),
        .out = out.data(),
        .out_type = Number::fp32,
    });
    return out;
}

void pass(Random& random, const Kernels& kernels) {
    const int kv_heads = random.within(1, 3);
    const Shape shape{random.within(1, 70),
                      kv_heads * random.within(1, 4),
                      kv_heads,
                      2 * random.within(1, 20),
                      random.within(1, 70),
                      1e-6f,
                      static_cast<Number>(random.within(0, 2)),
                      static_cast<Number>(random.within(0, 1))};
    const int layers = random.within(1, 3);
    const auto decoder = make_decoder(random, shape, kernels, layers);
    for (int i = 0; i < 3; ++i) {
        const Drawn drawn(random);
        const auto rows = random.floats(drawn.positions.size() * static_cast<std::size_t>(shape.hidden));
        const auto angles = random.floats(product({32, shape.head_dim}));
        const std::size_t slot = product({shape.kv_heads, shape.head_dim}) * bytes_of(shape.cache);
        const std::size_t bytes = product({layers, Drawn::kBlocks, Drawn::kBlock}) * slot;
        std::vector<std::byte> keys(bytes), values(bytes);
        const auto alone = run(*decoder, drawn, shape, rows, angles, keys, values, 1);
        auto again = keys, again_values = values;
        const auto together = run(*decoder, drawn, shape, rows, angles, again, again_values, 3);
        expect(alone == together, "three threads give other bits than one");
        expect(keys == again && values == again_values, "a second pass writes other keys");
        std::vector<bool> named(product({Drawn::kBlocks, Drawn::kBlock}));
        for (auto each : drawn.slots)
            if (each >= 0) named[static_cast<std::size_t>(each)] = true;
        for (std::size_t at = 0; at < bytes; ++at)
            expect(keys[at] == std::byte{0} || named[at / slot % named.size()], "a key where none belongs");
    }
}

void search(Random& random, const Kernels& kernels) {
    const int items = random.within(1, 900), users = random.within(1, 6), size = random.within(1, 70);
    const int k = random.within(1, items);
    std::vector<std::int32_t> depths;
    for (int u = 0; u < users; ++u) depths.push_back(random.within(1, k));
    const auto table = random.floats(product({items, size})), vectors = random.floats(product({users, size}));
    const auto prior = random.floats(static_cast<std::size_t>(items));
    const std::vector<char> available(static_cast<std::size_t>(items), 1);
    const std::vector<std::int32_t> excluded{0}, starts(static_cast<std::size_t>(users) + 1, 0);
    std::vector<float> scores(product({users, k})), again(scores.size());
    std::vector<std::int64_t> rows(scores.size()), rows_again(scores.size());
    Search wanted{reinterpret_cast<const std::byte*>(table.data()), reinterpret_cast<const std::byte*>(vectors.data()),
                  Number::fp32, items, users, size, k, depths.data(), prior.data(),
                  reinterpret_cast<const bool*>(available.data()),
                  {excluded.data(), starts.data()}, {nullptr, nullptr}, nullptr, scores.data(), rows.data()};
    top_scores(wanted, kernels, 1);
    wanted.bytes_per_thread = 1;
    wanted.scores = again.data(), wanted.rows = rows_again.data();
    top_scores(wanted, kernels, 3);
    expect(scores == again && rows == rows_again, "three threads find other items than one");
}

}  // namespace

int main(int count, char** arguments) {
    const int passes = count > 1 ? std::atoi(arguments[1]) : 100;
    for (const char* name : {"avx512", "avx2", "plain"}) {
        const Kernels* kernels = pick(name);
        if (kernels == nullptr) continue;
        Random random(7);
        for (int i = 0; i < passes; ++i) pass(random, *kernels), search(random, *kernels);
        std::printf("%s: %d passes and searches, clean\n", name, passes);
    }
}
