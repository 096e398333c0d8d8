// The Python face of the KV-cache manager: the only file that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>

#include "block_manager.h"
#include "message.h"

namespace py = pybind11;

namespace {

using speeder::BlockManager;
using speeder::CacheExhausted;
using speeder::CacheStats;
using speeder::StepPlan;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

void check_array(const py::array& array, const char* name, py::ssize_t width) {
    const int ndim = width == 0 ? 1 : 2;
    if (!Int32Array::check_(array) || array.ndim() != ndim) {
        throw py::value_error(speeder::message(name, ": must be a C-contiguous int32 array of ", ndim,
                                               " dimension(s), not ", std::string(py::str(array.dtype())), " of ",
                                               array.ndim()));
    }
    if (width > 0 && array.shape(1) != width) {
        throw py::value_error(speeder::message(name, ": must have ", width, " columns, not ", array.shape(1)));
    }
}

// width 0: one dimension; else [rows, width]
std::span<const std::int32_t> input(const py::array& array, const char* name, py::ssize_t width = 0) {
    check_array(array, name, width);
    return {static_cast<const std::int32_t*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::span<std::int32_t> output(py::array& array, const char* name, py::ssize_t width = 0) {
    check_array(array, name, width);
    if (!array.writeable()) throw py::value_error(speeder::message(name, ": is read-only"));
    return {static_cast<std::int32_t*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

std::optional<std::string_view> user_view(py::handle user, std::size_t index) {
    if (user.is_none()) return std::nullopt;
    if (!PyUnicode_Check(user.ptr())) {
        throw py::type_error(speeder::message("users[", index, "]: must be a str or None, not ",
                                              Py_TYPE(user.ptr())->tp_name));
    }
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(user.ptr(), &size);
    if (text == nullptr) throw py::error_already_set();
    return std::string_view(text, static_cast<std::size_t>(size));
}

StepPlan plan_unlocked(BlockManager& manager, const speeder::PlanRequest& request, const speeder::PlanBuffers& out) {
    const py::gil_scoped_release unlocked;
    return manager.plan(request, out);
}

py::tuple plan(BlockManager& manager, const py::list& users, const py::array& offsets, const py::array& keys,
               py::array cached_len, py::array session_slots, py::array block_tables, py::array slot_mapping,
               py::array copies) {
    // the tuple keeps the strings alive while the GIL is released, whatever happens to the list
    const py::tuple held(users);
    std::vector<std::optional<std::string_view>> views;
    views.reserve(held.size());
    for (const py::handle user : held) views.push_back(user_view(user, views.size()));
    // a copy: offsets that another thread changes after they were checked would lead out of `keys`
    const auto all_offsets = input(offsets, "offsets");
    const auto used = all_offsets.first(std::min(all_offsets.size(), views.size() + 1));
    const std::vector<std::int32_t> held_offsets(used.begin(), used.end());
    const speeder::PlanRequest request{views, held_offsets, input(keys, "keys", manager.config().key_width)};
    const auto width = block_tables.ndim() == 2 ? std::max<py::ssize_t>(block_tables.shape(1), 1) : 1;
    const speeder::PlanBuffers out{output(cached_len, "cached_len"),
                                   output(session_slots, "session_slots"),
                                   output(block_tables, "block_tables", width),
                                   static_cast<std::size_t>(width),
                                   output(slot_mapping, "slot_mapping"),
                                   output(copies, "copies", 3)};
    const StepPlan plan = plan_unlocked(manager, request, out);
    return py::make_tuple(plan.step, plan.num_new_rows, plan.num_copies);
}

CacheStats stats_of(const BlockManager& manager) {
    const py::gil_scoped_release unlocked;
    return manager.stats();
}

py::dict stats(const BlockManager& manager) {
    const CacheStats stats = stats_of(manager);
    using namespace py::literals;
    return py::dict("num_blocks"_a = stats.num_blocks, "num_free_blocks"_a = stats.num_free_blocks,
                    "num_sessions"_a = stats.num_sessions, "num_open_steps"_a = stats.num_open_steps,
                    "steps_planned"_a = stats.steps_planned, "steps_committed"_a = stats.steps_committed,
                    "steps_released"_a = stats.steps_released, "positions_reused"_a = stats.positions_reused,
                    "positions_planned"_a = stats.positions_planned, "copies"_a = stats.copies,
                    "evictions"_a = stats.evictions, "trims"_a = stats.trims);
}

std::unique_ptr<BlockManager> make_manager(std::int32_t num_blocks, std::int32_t block_size, std::int32_t shared_len,
                                           std::int32_t max_seq_len, std::int32_t key_width, std::int32_t max_sessions,
                                           bool retain) {
    return std::make_unique<BlockManager>(speeder::CacheConfig{num_blocks, block_size, shared_len, max_seq_len,
                                                               key_width, max_sessions, retain});
}

void bind_block_manager(py::module_& module) {
    // the manager's mutex is never waited for with the GIL held
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    py::class_<BlockManager>(module, "BlockManager")
        .def(py::init(&make_manager), py::kw_only(), py::arg("num_blocks"), py::arg("block_size"),
             py::arg("shared_len"), py::arg("max_seq_len"), py::arg("key_width") = 2, py::arg("max_sessions") = 65536,
             py::arg("retain") = true)
        .def("plan", &plan, py::arg("users"), py::arg("offsets"), py::arg("keys"), py::arg("cached_len"),
             py::arg("session_slots"), py::arg("block_tables"), py::arg("slot_mapping"), py::arg("copies"))
        .def("commit", &BlockManager::commit, py::arg("step"), Unlocked())
        .def("release", &BlockManager::release, py::arg("step"), Unlocked())
        .def("close", &BlockManager::close, py::arg("user"), Unlocked())
        .def("clear", &BlockManager::clear, Unlocked())
        .def("__contains__", &BlockManager::contains, py::arg("user"), Unlocked())
        .def("stats", &stats)
        .def("check_integrity", &BlockManager::check_integrity, Unlocked())
        .def_property_readonly("num_sessions", [](const BlockManager& self) { return stats_of(self).num_sessions; })
        .def_property_readonly("num_shared_blocks", &BlockManager::num_shared_blocks)
        .def_property_readonly("max_blocks_per_seq", &BlockManager::max_blocks_per_seq);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The KV-cache manager: block ids, sessions and plans.";
    py::register_exception<CacheExhausted>(module, "CacheExhausted", PyExc_RuntimeError);
    bind_block_manager(module);
}
