# The CUDA kernels, where there is a toolkit. They include no torch header and link the CUDA runtime statically, so the module
# compiles and loads beside any torch, also one for CPUs only, and without a driver.
set(cuda_sources)
set(cuda_objects)
set(cuda_libraries)
set(cuda_architectures)
if(VITDIV_CUDA STREQUAL "0")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(VITDIV_CUDA STREQUAL "1")
    message(FATAL_ERROR "VITDIV_CUDA=1 asks for CUDA kernels, but no nvcc that works was found: install the CUDA toolkit "
                        "and put nvcc on PATH or name it in CUDACXX, or leave VITDIV_CUDA unset for a CPU build.")
  endif()
  message(STATUS "No nvcc that works: the kernels are built for CPUs only.")
  return()
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80) # for the check of the compiler
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12) # which distributions still bring
  set(too_old "${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, and the kernels need 12 or later (C++20)")
  if(VITDIV_CUDA STREQUAL "1")
    message(FATAL_ERROR "VITDIV_CUDA=1 asks for CUDA kernels, but ${too_old}: name a later nvcc in CUDACXX, or leave "
                        "VITDIV_CUDA unset for a CPU build.")
  endif()
  message(STATUS "${too_old}: they are built for CPUs only.")
  return()
endif()
find_package(CUDAToolkit REQUIRED)

# As in torch: numbers such as 8.0 or 9.0a, separated by spaces or semicolons, +PTX for those that later GPUs can run.
set(TORCH_CUDA_ARCH_LIST "" CACHE STRING "GPUs to compile for, for instance '8.0 9.0+PTX'")
string(REGEX MATCHALL "[^ ;,]+" listed "${TORCH_CUDA_ARCH_LIST}")
foreach(item IN LISTS listed)
  if(NOT item MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold numbers such as 8.0, 9.0a or 9.0+PTX, got '${item}'.")
  endif()
  set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  if(number LESS 80) # images of containers list all GPUs that torch runs on
    message(STATUS "The CUDA kernels need compute capability 8.0 or later: '${item}' is left out.")
  elseif(CMAKE_MATCH_4)
    list(APPEND cuda_architectures ${number}${CMAKE_MATCH_3})
  else()
    list(APPEND cuda_architectures ${number}${CMAKE_MATCH_3}-real)
  endif()
endforeach()
if(listed AND NOT cuda_architectures)
  set(too_old "the CUDA kernels need compute capability 8.0 or later (cp.async, mma of bfloat16), and TORCH_CUDA_ARCH_LIST "
              "is '${TORCH_CUDA_ARCH_LIST}'")
  list(JOIN too_old "" too_old)
  if(VITDIV_CUDA STREQUAL "1")
    message(FATAL_ERROR "VITDIV_CUDA=1 asks for CUDA kernels, but ${too_old}.")
  endif()
  message(STATUS "Kernels are built for CPUs only: ${too_old}.")
  return()
endif()
set(also)
set(also_for)
if(NOT cuda_architectures)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(cuda_architectures 80-real 90) # 90: also PTX
  else()
    # Two thirds of nvcc's time go to PTX. That for 8.0 gives 9.0 the same code as its own; that for 10.0 serves 12.0, too.
    set(cuda_architectures 80-real 100)
    set(also --generate-code=arch=compute_80,code=[sm_90] --generate-code=arch=compute_100,code=[sm_120])
    set(also_for 90-real 120-real)
  endif()
endif()

file(GLOB cuda_kernel_sources CONFIGURE_DEPENDS csrc/cuda/*/*.cu)
add_library(cuda_kernels OBJECT ${cuda_kernel_sources})
set_target_properties(cuda_kernels PROPERTIES
  CUDA_ARCHITECTURES "${cuda_architectures}"
  CUDA_VISIBILITY_PRESET hidden)
# Not by CUDA_STANDARD, nor CXX_STANDARD which stands in for it: CMake 3.25 does not know that nvcc takes C++20.
set_property(TARGET cuda_kernels PROPERTY CXX_STANDARD)
target_compile_options(cuda_kernels PRIVATE -std=c++20 ${also})
list(APPEND cuda_architectures ${also_for})
message(STATUS "CUDA kernels for ${cuda_architectures}")
set(cuda_sources csrc/cuda/library.cpp csrc/cuda/core/launch.cpp)
set(cuda_objects $<TARGET_OBJECTS:cuda_kernels>)
set(cuda_libraries CUDA::cudart_static ${CMAKE_DL_LIBS})
