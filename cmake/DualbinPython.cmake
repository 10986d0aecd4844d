# The module dualbin._native: pybind11 functions for PyTorch and NumPy, XLA FFI handlers for JAX.

if(NOT DUALBIN_PYTHON MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DUALBIN_PYTHON must be AUTO, ON or OFF, got '${DUALBIN_PYTHON}'")
endif()
if(DUALBIN_PYTHON STREQUAL "OFF")
  return()
endif()

set(required "")
if(DUALBIN_PYTHON STREQUAL "ON" OR SKBUILD)
  set(required REQUIRED)
endif()
find_package(Python 3.11 COMPONENTS Interpreter Development.Module ${required})
if(Python_FOUND AND NOT pybind11_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir
                  OUTPUT_VARIABLE pybind11_from_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.13 CONFIG QUIET HINTS "${pybind11_from_python}" ${required})
if(NOT Python_FOUND OR NOT pybind11_FOUND)
  message(STATUS "dualbin: no Python headers or no pybind11, the module _native is not built")
  return()
endif()

if(NOT DUALBIN_XLA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DUALBIN_XLA must be AUTO, ON or OFF, got '${DUALBIN_XLA}'")
endif()

# XLA FFI headers. The spec of jaxlib is looked up, not imported: an import needs a working NumPy and takes seconds.
set(xla_include "${DUALBIN_XLA_FFI_INCLUDE}")
if(NOT xla_include AND NOT DUALBIN_XLA STREQUAL "OFF")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('jaxlib'); print(s.submodule_search_locations[0] + '/include' if s else '')"
    OUTPUT_VARIABLE xla_include OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
set(with_xla FALSE)
if(DUALBIN_XLA STREQUAL "OFF")
  message(STATUS "dualbin: DUALBIN_XLA is OFF, _native is built without XLA handlers")
elseif(EXISTS "${xla_include}/xla/ffi/api/ffi.h")
  set(with_xla TRUE)
  message(STATUS "dualbin: XLA FFI headers in ${xla_include}")
elseif(DUALBIN_XLA_FFI_INCLUDE)
  message(FATAL_ERROR "DUALBIN_XLA_FFI_INCLUDE: there is no xla/ffi/api/ffi.h in ${DUALBIN_XLA_FFI_INCLUDE}")
elseif(DUALBIN_XLA STREQUAL "ON")
  message(FATAL_ERROR "DUALBIN_XLA is ON, but there is no jaxlib, whose headers are needed: install jaxlib, or build for PyTorch alone "
                      "with DUALBIN_XLA=OFF (pip install . -C cmake.define.DUALBIN_XLA=OFF)")
else()
  message(STATUS "dualbin: no jaxlib, _native is built without XLA handlers")
endif()

file(GLOB binding_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/bindings/*.cpp")
if(NOT with_xla)
  list(FILTER binding_sources EXCLUDE REGEX "/xla_[a-z_]*\\.cpp$")
elseif(NOT DUALBIN_WITH_CUDA)
  list(FILTER binding_sources EXCLUDE REGEX "/xla_cuda\\.cpp$")
endif()

pybind11_add_module(_native MODULE NO_EXTRAS ${binding_sources})
dualbin_target(_native)
target_link_libraries(_native PRIVATE dualbin_core)
set(dualbin_architectures "")
if(DUALBIN_WITH_CUDA)
  list(JOIN CMAKE_CUDA_ARCHITECTURES "," dualbin_architectures)  # definitions are a list themselves: a semicolon would end this one
endif()
target_compile_definitions(_native PRIVATE
  DUALBIN_VERSION="${PROJECT_VERSION}"
  DUALBIN_CUDA_ARCHITECTURES="${dualbin_architectures}")
if(with_xla)
  target_compile_definitions(_native PRIVATE DUALBIN_WITH_XLA=1)
  target_include_directories(_native SYSTEM PRIVATE "${xla_include}")
endif()
find_package(OpenMP COMPONENTS CXX)
if(OpenMP_CXX_FOUND)
  target_link_libraries(_native PRIVATE OpenMP::OpenMP_CXX)
endif()

if(DUALBIN_INPLACE)
  set_target_properties(_native PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${PROJECT_SOURCE_DIR}/src/dualbin")
endif()
install(TARGETS _native LIBRARY DESTINATION dualbin)
