// The Python face of the KV-cache manager and of what it plans: the only file that knows Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "block_manager.h"
#include "message.h"
#include "row_layout.h"

namespace py = pybind11;

namespace {

using speeder::BlockManager;
using speeder::CacheExhausted;
using speeder::CacheStats;
using speeder::StepPlan;

template <typename T>
void check_array(const py::array& array, const char* name, py::ssize_t width) {
    const int ndim = width == 0 ? 1 : 2;
    if (!py::array_t<T, py::array::c_style>::check_(array) || array.ndim() != ndim) {
        throw py::value_error(speeder::message(name, ": must be a C-contiguous ",
                                               std::string(py::str(py::dtype::of<T>())), " array of ", ndim,
                                               " dimension(s), not ", std::string(py::str(array.dtype())), " of ",
                                               array.ndim()));
    }
    if (width > 0 && array.shape(1) != width) {
        throw py::value_error(speeder::message(name, ": must have ", width, " columns, not ", array.shape(1)));
    }
}

// width 0: one dimension; else [rows, width]
std::span<const std::int32_t> input(const py::array& array, const char* name, py::ssize_t width = 0) {
    check_array<std::int32_t>(array, name, width);
    return {static_cast<const std::int32_t*>(array.data()), static_cast<std::size_t>(array.size())};
}

template <typename T = std::int32_t>
std::span<T> output(py::array& array, const char* name, py::ssize_t width = 0) {
    check_array<T>(array, name, width);
    if (!array.writeable()) throw py::value_error(speeder::message(name, ": is read-only"));
    return {static_cast<T*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
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

// What a request reads, kept in place while the GIL is released.
class HeldRequest {
public:
    HeldRequest(const BlockManager& manager, const py::list& users, const py::array& offsets, const py::array& keys)
        : users_(users), keys_(input(keys, "keys", manager.config().key_width)) {
        views_.reserve(users_.size());
        for (const py::handle user : users_) views_.push_back(user_view(user, views_.size()));
        const auto all = input(offsets, "offsets");
        const auto used = all.first(std::min(all.size(), views_.size() + 1));
        offsets_.assign(used.begin(), used.end());
    }
    speeder::PlanRequest view() const { return {views_, offsets_, keys_}; }

private:
    py::tuple users_;  // keeps the strings alive, whatever happens to the list
    std::vector<std::optional<std::string_view>> views_;
    std::vector<std::int32_t> offsets_;  // a copy: changed after they were checked, they would lead out of `keys`
    std::span<const std::int32_t> keys_;
};

StepPlan plan_unlocked(BlockManager& manager, const speeder::PlanRequest& request, const speeder::PlanBuffers& out) {
    const py::gil_scoped_release unlocked;
    return manager.plan(request, out);
}

py::tuple plan(BlockManager& manager, const py::list& users, const py::array& offsets, const py::array& keys,
               py::array cached_len, py::array session_slots, py::array block_tables, py::array slot_mapping,
               py::array copies, py::array restores) {
    const HeldRequest request(manager, users, offsets, keys);
    const auto width = block_tables.ndim() == 2 ? std::max<py::ssize_t>(block_tables.shape(1), 1) : 1;
    const speeder::PlanBuffers out{output(cached_len, "cached_len"),
                                   output(session_slots, "session_slots"),
                                   output(block_tables, "block_tables", width),
                                   static_cast<std::size_t>(width),
                                   output(slot_mapping, "slot_mapping"),
                                   output(copies, "copies", 3),
                                   output(restores, "restores", 2)};
    const StepPlan plan = plan_unlocked(manager, request.view(), out);
    return py::make_tuple(plan.step, plan.num_new_rows, plan.num_copies, plan.num_restores);
}

void peek(BlockManager& manager, const py::list& users, const py::array& offsets, const py::array& keys,
          py::array cached_len) {
    const HeldRequest request(manager, users, offsets, keys);
    const auto out = output(cached_len, "cached_len");
    const py::gil_scoped_release unlocked;
    manager.peek(request.view(), out);
}

std::int32_t commit(BlockManager& manager, std::int64_t step, py::array offloads) {
    const auto out = output(offloads, "offloads", 2);
    const py::gil_scoped_release unlocked;
    return manager.commit(step, out);
}

// [count, width]
speeder::Fields fields(py::array& array, const char* name, std::size_t count) {
    const auto width = array.ndim() == 2 ? array.shape(1) : 0;
    // an empty matrix has no columns to be counted
    const auto values = width == 0 ? std::span<std::int64_t>() : output<std::int64_t>(array, name, width);
    if (array.ndim() != 2 || array.shape(0) != static_cast<py::ssize_t>(count)) {
        throw py::value_error(speeder::message(name, ": must have ", count, " rows"));
    }
    return {values, static_cast<std::size_t>(width)};
}

std::span<std::uint8_t> flags(py::array& array, const char* name) {
    const auto values = output<bool>(array, name);
    return {reinterpret_cast<std::uint8_t*>(values.data()), values.size()};  // numpy's are bytes
}

void lay_out(const py::array& offsets, const py::array& keys, const py::array& cached_len,
             const py::array& session_slots, const py::array& slot_mapping, const py::array& num_ranked,
             const py::array& candidates, std::int32_t instruction_len, std::int32_t instruction_slot,
             std::int32_t scratch_slot, std::int32_t nobody, py::array rows, py::array reads, py::array users,
             py::array candidate, py::array read_candidate, py::array is_new) {
    const speeder::RowSource source{input(offsets, "offsets"),
                                    input(keys, "keys", 3),
                                    input(cached_len, "cached_len"),
                                    input(session_slots, "session_slots"),
                                    input(slot_mapping, "slot_mapping"),
                                    input(num_ranked, "num_ranked"),
                                    input(candidates, "candidates")};
    const speeder::RowTarget target{fields(rows, "rows", speeder::kRowFields),
                                    fields(reads, "reads", speeder::kReadFields),
                                    fields(users, "users", speeder::kUserFields),
                                    flags(candidate, "candidate"),
                                    flags(read_candidate, "read_candidate"),
                                    flags(is_new, "is_new")};
    speeder::lay_out(source, {instruction_len, instruction_slot, scratch_slot, nobody}, target);
}

CacheStats stats_of(const BlockManager& manager) {
    const py::gil_scoped_release unlocked;
    return manager.stats();
}

py::dict stats(const BlockManager& manager) {
    const CacheStats stats = stats_of(manager);
    using namespace py::literals;
    return py::dict("num_blocks"_a = stats.num_blocks, "num_free_blocks"_a = stats.num_free_blocks,
                    "num_sessions"_a = stats.num_sessions, "num_host_sessions"_a = stats.num_host_sessions,
                    "num_pinned"_a = stats.num_pinned, "num_open_steps"_a = stats.num_open_steps,
                    "session_blocks"_a = stats.session_blocks, "host_blocks_used"_a = stats.host_blocks_used,
                    "num_host_blocks"_a = stats.num_host_blocks, "steps_planned"_a = stats.steps_planned,
                    "steps_committed"_a = stats.steps_committed, "steps_released"_a = stats.steps_released,
                    "positions_reused"_a = stats.positions_reused, "positions_planned"_a = stats.positions_planned,
                    "copies"_a = stats.copies, "evictions"_a = stats.evictions, "offloads"_a = stats.offloads,
                    "restores"_a = stats.restores, "truncations"_a = stats.truncations);
}

std::int64_t open_step(const BlockManager& manager) {
    const py::gil_scoped_release unlocked;
    return manager.open_step();
}

std::unique_ptr<BlockManager> make_manager(std::int32_t num_blocks, std::int32_t block_size, std::int32_t shared_len,
                                           std::int32_t max_seq_len, std::int32_t key_width,
                                           std::int32_t budget_blocks, std::int32_t max_sessions,
                                           std::int32_t num_slots, std::int32_t max_blocks_per_user,
                                           std::int32_t num_host_blocks, bool track_freed) {
    return std::make_unique<BlockManager>(
        speeder::CacheConfig{num_blocks, block_size, shared_len, max_seq_len, key_width, budget_blocks, max_sessions,
                             num_slots, max_blocks_per_user, num_host_blocks, track_freed});
}

void bind_block_manager(py::module_& module) {
    // the manager's mutex is never waited for with the GIL held
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    py::class_<BlockManager>(module, "BlockManager")
        .def(py::init(&make_manager), py::kw_only(), py::arg("num_blocks"), py::arg("block_size"),
             py::arg("shared_len"), py::arg("max_seq_len"), py::arg("key_width") = 3, py::arg("budget_blocks"),
             py::arg("max_sessions") = 65536, py::arg("num_slots"), py::arg("max_blocks_per_user") = 0,
             py::arg("num_host_blocks") = 0, py::arg("track_freed") = false)
        .def("plan", &plan, py::arg("users"), py::arg("offsets"), py::arg("keys"), py::arg("cached_len"),
             py::arg("session_slots"), py::arg("block_tables"), py::arg("slot_mapping"), py::arg("copies"),
             py::arg("restores"))
        .def("peek", &peek, py::arg("users"), py::arg("offsets"), py::arg("keys"), py::arg("cached_len"))
        .def("commit", &commit, py::arg("step"), py::arg("offloads"))
        .def("finish", &BlockManager::finish, py::arg("step"), py::arg("moved"), Unlocked())
        .def("release", &BlockManager::release, py::arg("step"), Unlocked())
        .def("pin", &BlockManager::pin, py::arg("user"), py::arg("pinned") = true, Unlocked())
        .def("pinned", &BlockManager::pinned, Unlocked())
        .def("close", &BlockManager::close, py::arg("user"), Unlocked())
        .def("clear", &BlockManager::clear, Unlocked())
        .def("__contains__", &BlockManager::contains, py::arg("user"), Unlocked())
        .def("stats", &stats)
        .def("take_freed", &BlockManager::take_freed, Unlocked())
        .def("check_integrity", &BlockManager::check_integrity, Unlocked())
        .def_property_readonly("num_sessions", [](const BlockManager& self) { return stats_of(self).num_sessions; })
        .def_property_readonly("open_step", &open_step)
        .def_property_readonly("num_shared_blocks", &BlockManager::num_shared_blocks)
        .def_property_readonly("max_blocks_per_seq", &BlockManager::max_blocks_per_seq);
}

void bind_row_layout(py::module_& module) {
    module.def("lay_out", &lay_out, py::arg("offsets"), py::arg("keys"), py::arg("cached_len"),
               py::arg("session_slots"), py::arg("slot_mapping"), py::arg("num_ranked"), py::arg("candidates"),
               py::arg("instruction_len"), py::arg("instruction_slot"), py::arg("scratch_slot"), py::arg("nobody"),
               py::arg("rows"), py::arg("reads"), py::arg("users"), py::arg("candidate"), py::arg("read_candidate"),
               py::arg("is_new"));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The KV-cache manager: block ids, sessions and plans; and the rows that a plan leaves to compute.";
    py::register_exception<CacheExhausted>(module, "CacheExhausted", PyExc_RuntimeError);
    bind_block_manager(module);
    bind_row_layout(module);
}
