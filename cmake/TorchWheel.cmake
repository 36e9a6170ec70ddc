# The imported targets torchwheel::torch and, with what Python modules need, torchwheel::python; and TORCHWHEEL_VERSION: of the
# torch that is installed as a Python package.
# find_package(Torch) is not used: beside a CUDA build of torch it insists on a complete CUDA toolkit, even for an
# extension that holds CPU code only.
# Input: TORCH_ROOT, the folder of the torch package.

file(STRINGS "${TORCH_ROOT}/version.py" _version REGEX "^__version__ = ")
string(REGEX REPLACE ".*['\"](.+)['\"].*" "\\1" TORCHWHEEL_VERSION "${_version}")

add_library(torchwheel::torch INTERFACE IMPORTED)
target_include_directories(torchwheel::torch SYSTEM INTERFACE "${TORCH_ROOT}/include"
                                                              "${TORCH_ROOT}/include/torch/csrc/api/include")
add_library(torchwheel::python INTERFACE IMPORTED)
target_link_libraries(torchwheel::python INTERFACE torchwheel::torch)
foreach(_name c10 torch_cpu torch torch_python)
  # NO_CACHE: an isolated build sees torch at another path each time, and a remembered path would be gone.
  find_library(_library ${_name} PATHS "${TORCH_ROOT}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  if(_name STREQUAL "torch_python")
    target_link_libraries(torchwheel::python INTERFACE "${_library}")
  else()
    target_link_libraries(torchwheel::torch INTERFACE "${_library}")
  endif()
  unset(_library)
endforeach()
