// The Python face of the CPU path: the only file here that knows Python. Tensors come as addresses, since numpy has no
// bf16; engine/native/ checks their types, shapes and layout, and keeps them alive during a call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "decoder.h"
#include "packed_linear.h"
#include "thread_pool.h"
#include "top_scores.h"

namespace py = pybind11;

namespace {

using namespace speeder::cpu;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Number number(const std::string& name) {
    if (name == "float32") return Number::fp32;
    if (name == "bfloat16") return Number::bf16;
    if (name == "int8") return Number::int8;
    throw py::value_error("type: '" + name + "' is none of float32, bfloat16, int8");
}

const Kernels& kernels(const std::string& name) {
    const Kernels* found = pick(name);
    if (found == nullptr) throw py::value_error("kernels: this machine has no '" + name + "'");
    return *found;
}

// (address, type, rows, columns)
using MatrixArguments = std::tuple<Address, std::string, int, int>;

Matrix matrix(const MatrixArguments& given) {
    const auto& [address, type, rows, columns] = given;
    return {at<const std::byte>(address), number(type), rows, columns};
}

// One packed layer alone: for tests, and to measure products by themselves.
class Linear {
public:
    Linear(const MatrixArguments& weight, Address bias, const std::string& type, bool gated, const std::string& isa,
           int threads)
        : kernels_(kernels(isa)),
          threads_(threads),
          packed_(matrix(weight), at<const float>(bias), number(type), gated, threads, kernels_) {}

    // rows fp32 [n, inputs] -> out fp32 [n, outputs], through rows of the weights' type
    void run(Address rows, int num_rows, Address out) const {
        const int size = packed_.inputs(), wide = padded(size);
        const int columns = packed_.num_panels() * packed_.columns_of_panel();
        const auto stride = static_cast<std::ptrdiff_t>(wide * bytes_of(packed_.type()));
        const auto count = static_cast<std::size_t>(num_rows);
        Buffer typed(count * static_cast<std::size_t>(stride)), found(count * static_cast<std::size_t>(columns) * 4);
        std::vector<float> scale(count), row(static_cast<std::size_t>(wide), 0.0f);
        const Rows packed_rows{typed.data(), stride, scale.data()};
        for (int i = 0; i < num_rows; ++i) {
            std::copy_n(at<const float>(rows) + std::ptrdiff_t{i} * size, size, row.begin());
            if (packed_.type() == Number::int8) kernels_.quantize(row.data(), wide, packed_rows, i);
            else kernels_.narrow(row.data(), wide, packed_.type(), packed_rows.row(i));
        }
        std::vector<Buffer> scratch;
        for (int t = 0; t < threads_; ++t) scratch.emplace_back(count * kPanel * 4);
        std::atomic<int> next{0};
        ThreadPool::shared().run(threads_, [&](int thread) {
            for (int p; (p = next.fetch_add(1)) < packed_.num_panels();) {
                auto* target = found.as<float>() + p * packed_.columns_of_panel();
                kernels_.product[static_cast<int>(packed_.type())](
                    packed_.panel(p), packed_rows, num_rows,
                    {reinterpret_cast<std::byte*>(target), columns * 4, packed_.gated(), Number::fp32},
                    scratch[static_cast<std::size_t>(thread)].data());
            }
        });
        for (int i = 0; i < num_rows; ++i)
            std::copy_n(found.as<float>() + std::ptrdiff_t{i} * columns, packed_.outputs(),
                        at<float>(out) + std::ptrdiff_t{i} * packed_.outputs());
    }

private:
    const Kernels& kernels_;
    int threads_;
    PackedLinear packed_;
};

void add_layer(Decoder& decoder, const MatrixArguments& qkv, const MatrixArguments& out, const MatrixArguments& gate_up,
               const MatrixArguments& down, const std::vector<Address>& biases, const std::vector<Address>& norms) {
    if (biases.size() != 4 || norms.size() != 4) throw py::value_error("biases, norms: four addresses each");
    const auto floats = [](Address address) { return at<const float>(address); };
    decoder.add_layer({matrix(qkv), matrix(out), matrix(gate_up), matrix(down), floats(biases[0]), floats(biases[1]),
                       floats(biases[2]), floats(biases[3]), floats(norms[0]), floats(norms[1]), floats(norms[2]),
                       floats(norms[3])});
}

// What a pass is given, by name: `Pass` says what each means.
Pass pass_of(const py::dict& given) {
    const auto whole = [&](const char* name) { return py::cast<int>(given[name]); };
    const auto address = [&](const char* name) { return py::cast<Address>(given[name]); };
    const auto ints = [&](const char* name) { return at<const std::int64_t>(address(name)); };
    const auto bytes = [&](const char* name) { return at<std::byte>(address(name)); };
    const auto type = [&](const char* name) { return number(py::cast<std::string>(given[name])); };
    return {
        .num_rows = whole("num_rows"),
        .rows = bytes("rows"),
        .rows_type = type("rows_type"),
        .positions = ints("positions"),
        .cos = at<const float>(address("cos")),
        .sin = at<const float>(address("sin")),
        .num_positions = py::cast<std::int64_t>(given["num_positions"]),
        .slot_mapping = ints("slot_mapping"),
        .num_mapped = whole("num_mapped"),
        .sequence = ints("sequence"),
        .visible = ints("visible"),
        .candidate = at<const bool>(address("candidate")),
        .paths = ints("paths"),
        .num_pathed = whole("num_pathed"),
        .path_width = whole("path_width"),
        .block_tables = ints("block_tables"),
        .table_width = whole("table_width"),
        .num_sequences = whole("num_sequences"),
        .shared_blocks = ints("shared_blocks"),
        .shared_len = whole("shared_len"),
        .block_size = whole("block_size"),
        .keys = bytes("keys"),
        .values = bytes("values"),
        .layer_bytes = py::cast<std::ptrdiff_t>(given["layer_bytes"]),
        .own_slots = ints("own_slots"),
        .own_keys = bytes("own_keys"),
        .own_values = bytes("own_values"),
        .own_layer_bytes = py::cast<std::ptrdiff_t>(given["own_layer_bytes"]),
        .read_rows = ints("read_rows"),
        .num_reads = whole("num_reads"),
        .out = bytes("out"),
        .out_type = type("out_type"),
    };
}

void search(const py::dict& given, const std::string& isa, int threads) {
    const auto whole = [&](const char* name) { return py::cast<int>(given[name]); };
    const auto address = [&](const char* name) { return py::cast<Address>(given[name]); };
    const auto lists = [&](const char* rows, const char* starts) {
        return RowLists{at<const std::int32_t>(address(rows)), at<const std::int32_t>(address(starts))};
    };
    const Search wanted{
        .table = at<const std::byte>(address("table")),
        .users = at<const std::byte>(address("users")),
        .type = number(py::cast<std::string>(given["type"])),
        .num_items = whole("num_items"),
        .num_users = whole("num_users"),
        .size = whole("size"),
        .k = whole("k"),
        .depths = at<const std::int32_t>(address("depths")),
        .prior = at<const float>(address("prior")),
        .available = at<const bool>(address("available")),
        .excluded = lists("excluded_rows", "excluded_starts"),
        .allowed = lists("allowed_rows", "allowed_starts"),
        .limited = at<const bool>(address("limited")),
        .scores = at<float>(address("scores")),
        .rows = at<std::int64_t>(address("rows")),
    };
    const Kernels& chosen = kernels(isa);
    const py::gil_scoped_release release;
    top_scores(wanted, chosen, threads);
}

// Every byte once, by all threads: the floor under whatever walks over memory.
float read_all(Address address, std::size_t bytes, const std::string& isa, int threads) {
    const Kernels& chosen = kernels(isa);
    constexpr std::size_t kPiece = std::size_t{1} << 18;
    std::vector<float> found(static_cast<std::size_t>(threads), 0.0f);
    std::atomic<std::size_t> next{0};
    const py::gil_scoped_release release;
    ThreadPool::shared().run(threads, [&](int thread) {
        for (std::size_t begin; (begin = next.fetch_add(kPiece)) < bytes;)
            found[static_cast<std::size_t>(thread)] += chosen.read(at<const std::byte>(address) + begin, std::min(kPiece, bytes - begin));
    });
    return *std::max_element(found.begin(), found.end());
}

// Asks for huge pages under memory that somebody else allocated; whether the system gives them is its affair.
void advise_huge(Address address, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr Address kPage = 4096;
    const Address begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
    if (begin >= end) return;
    madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#if defined(MADV_COLLAPSE)
    madvise(at<void>(begin), end - begin, MADV_COLLAPSE);
#endif
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "The native CPU path: whole decoder passes from packed weights, and the search through the catalogue.";
    module.def("best_kernels", [] { return std::string(pick("")->name); }, "avx512, avx2 or plain");
    module.def(
        "has_kernels", [](const std::string& name) { return pick(name) != nullptr; }, py::arg("name"));
    module.def("advise_huge", &advise_huge, py::arg("address"), py::arg("num_bytes"));
    module.def("read", &read_all, py::arg("address"), py::arg("num_bytes"), py::arg("isa"), py::arg("threads"));
    module.def("top_scores", &search, py::arg("search"), py::arg("isa"), py::arg("threads"));

    py::class_<Linear>(module, "Linear")
        .def(py::init<const MatrixArguments&, Address, const std::string&, bool, const std::string&, int>(),
             py::arg("weight"), py::arg("bias"), py::arg("type"), py::arg("gated"), py::arg("isa"), py::arg("threads"))
        .def("run", &Linear::run, py::arg("rows"), py::arg("num_rows"), py::arg("out"),
             py::call_guard<py::gil_scoped_release>());

    py::class_<Decoder>(module, "Decoder")
        .def(py::init([](int hidden, int heads, int kv_heads, int head_dim, int intermediate, float eps,
                         const std::string& weights, const std::string& cache, const std::string& isa, int threads) {
                 return std::make_unique<Decoder>(
                     Shape{hidden, heads, kv_heads, head_dim, intermediate, eps, number(weights), number(cache)},
                     kernels(isa), threads);
             }),
             py::kw_only(), py::arg("hidden"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
             py::arg("intermediate"), py::arg("eps"), py::arg("weights"), py::arg("cache"), py::arg("isa"),
             py::arg("threads"))
        .def("add_layer", &add_layer, py::kw_only(), py::arg("qkv"), py::arg("out"), py::arg("gate_up"), py::arg("down"),
             py::arg("biases"), py::arg("norms"), py::call_guard<py::gil_scoped_release>())
        .def("set_norm", [](Decoder& decoder, Address weight) { decoder.set_norm(at<const float>(weight)); })
        .def("forward",
             [](Decoder& decoder, const py::dict& given) {
                 const Pass pass = pass_of(given);
                 const py::gil_scoped_release release;
                 decoder.forward(pass);
             })
        .def_property("threads", &Decoder::threads, &Decoder::set_threads)
        .def_property("kept_rows", &Decoder::kept_rows, &Decoder::set_kept_rows)
        .def_property("work_per_thread", &Decoder::work_per_thread, &Decoder::set_work_per_thread)
        .def_property_readonly("num_layers", &Decoder::num_layers)
        .def_property_readonly("weight_bytes", &Decoder::weight_bytes)
        .def_property_readonly("scratch_bytes", &Decoder::scratch_bytes);
}
