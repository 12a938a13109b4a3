// The tools and options that this library was built with.
#pragma once

#include <map>
#include <string>

namespace dparallel {

std::map<std::string, std::string> build_info();

}  // namespace dparallel
