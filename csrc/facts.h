// What the library tells of this machine; the Python module _C hands it on.
#pragma once

#include <string>

namespace vitdiv {

__attribute__((visibility("default"))) std::string cpu_capability();
__attribute__((visibility("default"))) int num_threads();

}  // namespace vitdiv
