// Errors: CHECK throws one sentence with the values in it; bind.cpp turns it into halfturn.Error.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace halfturn {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Joins values into one string: sentence("rows ", 3, " of ", 4).
template <class... Values>
std::string sentence(const Values&... values) {
  std::ostringstream out;
  (out << ... << values);
  return out.str();
}

}  // namespace halfturn

#define CHECK(condition, ...)                                                     \
  do {                                                                            \
    if (!(condition)) throw ::halfturn::Error(::halfturn::sentence(__VA_ARGS__)); \
  } while (0)
