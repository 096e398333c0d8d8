// Error messages: pieces of text and numbers, joined; and the check of an argument that throws one.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace speeder {

template <typename... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return std::move(text).str();
}

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (!holds) throw std::invalid_argument(message(parts...));
}

}  // namespace speeder
