# CUDA kernels, if wanted and possible.
#
#   CBAM_OPS_CUDA=AUTO  where there is an nvcc that works, else CPU only, and why is recorded
#   CBAM_OPS_CUDA=ON    with nvcc, or stop
#   CBAM_OPS_CUDA=OFF
#
# Given as -DCBAM_OPS_CUDA=..., through pip as `-C cmake.define.CBAM_OPS_CUDA=...` or as an
# environment variable of that name. nvcc is CUDACXX or the one on PATH; the build backend may give
# the one that pip installed (CMAKE_CUDA_COMPILER).
#
# Defines: CBAM_OPS_CUDA_ENABLED, CBAM_OPS_CUDA_WHY_NOT, CBAM_OPS_CUDA_VERSION,
#          CMAKE_CUDA_ARCHITECTURES.

set(CBAM_OPS_CUDA_ENABLED OFF)
set(CBAM_OPS_CUDA_WHY_NOT "")
set(CBAM_OPS_CUDA_VERSION "")

string(TOUPPER "${CBAM_OPS_CUDA}" CBAM_OPS_CUDA_MODE)
if(NOT CBAM_OPS_CUDA_MODE MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CBAM_OPS_CUDA must be AUTO, ON or OFF, got '${CBAM_OPS_CUDA}'.")
endif()

include(CheckLanguage)
if(NOT CBAM_OPS_CUDA_MODE STREQUAL "OFF")
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # "not found" of an earlier run is no answer for this one
  endif()
  check_language(CUDA)
endif()

if(CBAM_OPS_CUDA_MODE STREQUAL "OFF")
  set(CBAM_OPS_CUDA_WHY_NOT "switched off (CBAM_OPS_CUDA=OFF)")
elseif(NOT CMAKE_CUDA_COMPILER)
  set(CBAM_OPS_CUDA_WHY_NOT "no nvcc that works was found")
  if(CBAM_OPS_CUDA_MODE STREQUAL "ON")
    message(FATAL_ERROR "CBAM_OPS_CUDA=ON, but no CUDA compiler was found. Put nvcc on PATH or set "
      "CUDACXX=/path/to/nvcc (`pip install` with build isolation brings NVIDIA's), or build with "
      "CBAM_OPS_CUDA=AUTO or OFF.")
  endif()
else()
  # Machine code for the first architecture of every generation that this nvcc knows from Turing on
  # (75, 80, 90, ...; the generation's later ones run it: 80's on 86, 87 and 89), and PTX of the newest
  # for those to come. To be set before the language is enabled. Each costs about 20 seconds of one core.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    execute_process(
      COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
      OUTPUT_VARIABLE architectures OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[0-9]+" architectures "${architectures}")
    list(SORT architectures COMPARE NATURAL)
    list(REMOVE_DUPLICATES architectures)
    set(wanted "")
    set(last_generation "")
    foreach(architecture IN LISTS architectures)
      if(architecture GREATER_EQUAL 75)
        math(EXPR generation "${architecture} / 10")
        if(NOT generation STREQUAL last_generation)
          list(APPEND wanted "${architecture}-real")
        endif()
        set(last_generation "${generation}")
        set(newest "${architecture}")
      endif()
    endforeach()
    set(CMAKE_CUDA_ARCHITECTURES "${wanted};${newest}-virtual")
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  # The machine that runs it needs a driver, nothing else.
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CBAM_OPS_CUDA_ENABLED ON)
  set(CBAM_OPS_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
endif()

if(CBAM_OPS_CUDA_ENABLED)
  message(STATUS "CUDA kernels: ${CBAM_OPS_CUDA_VERSION}, for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "CUDA kernels: none, ${CBAM_OPS_CUDA_WHY_NOT}")
endif()

function(cbam_ops_add_cuda_kernels library)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/core/cuda/*.cu")
  target_sources(${library} PRIVATE ${sources})
  target_compile_definitions(${library} PUBLIC CBAM_HAVE_CUDA=1)
  # For messages about an architecture that was not built.
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  set_property(SOURCE "${PROJECT_SOURCE_DIR}/csrc/core/cuda/kernels.cu" APPEND PROPERTY
    COMPILE_DEFINITIONS "CBAM_OPS_CUDA_ARCHITECTURES=\"${architectures}\"")
  target_compile_options(${library} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
    $<$<AND:$<BOOL:${CBAM_OPS_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)
endfunction()
