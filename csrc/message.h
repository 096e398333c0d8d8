// Error messages: pieces of text and numbers, joined.
#pragma once

#include <sstream>
#include <string>

namespace speeder {

template <typename... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return std::move(text).str();
}

}  // namespace speeder
