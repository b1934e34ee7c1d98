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
#          CBAM_OPS_CUDA_TARGETS.

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
  # Which GPUs to build for, in the words of CMAKE_CUDA_ARCHITECTURES: those of that variable, or else
  # the GPUs of this machine alone, or else one of every generation (whose later members run it) and PTX
  # for those to come. To be set before the language is enabled.
  set(CBAM_OPS_CUDA_TARGETS "${CMAKE_CUDA_ARCHITECTURES}")
  set(CBAM_OPS_CUDA_FLAGS "")
  if(NOT CBAM_OPS_CUDA_TARGETS)
    execute_process(
      COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code
      OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    string(REGEX MATCHALL "[0-9]+" known "${known}")
    find_program(CBAM_OPS_NVIDIA_SMI nvidia-smi)
    if(CBAM_OPS_NVIDIA_SMI)
      execute_process(
        COMMAND "${CBAM_OPS_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE here ERROR_QUIET RESULT_VARIABLE failed)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" here "${here}")
      string(REPLACE "." "" here "${here}")
      list(REMOVE_DUPLICATES here)
      set(unknown ${here})
      list(REMOVE_ITEM unknown ${known})
      if(NOT failed AND here AND NOT unknown)
        set(CBAM_OPS_CUDA_TARGETS "${here}")
        set(CMAKE_CUDA_ARCHITECTURES "${here}")
      endif()
    endif()
  endif()
  if(NOT CBAM_OPS_CUDA_TARGETS)
    # The sources know two kinds of machines, below 80 and from 80 on. So they are translated to PTX
    # twice, and the later machines' code is made of that of 80.
    set(code "")
    foreach(architecture 75 80 90 100 120)
      if(NOT architecture IN_LIST known)
        continue()
      endif()
      list(APPEND CBAM_OPS_CUDA_TARGETS "${architecture}-real")
      if(architecture EQUAL 75)
        list(APPEND CBAM_OPS_CUDA_FLAGS "--generate-code=arch=compute_75,code=sm_75")
      else()
        list(APPEND code "sm_${architecture}")
      endif()
    endforeach()
    list(APPEND CBAM_OPS_CUDA_TARGETS "80-virtual")
    list(JOIN code "," code)
    list(APPEND CBAM_OPS_CUDA_FLAGS "--generate-code=arch=compute_80,code=[${code},compute_80]")
    set(CMAKE_CUDA_ARCHITECTURES OFF)
  endif()
  # nvcc's -O is for the host's code, which plans calls: with -O3 a type takes over a second more.
  set(CMAKE_CUDA_FLAGS_RELEASE "-O2 -DNDEBUG" CACHE STRING "nvcc's flags in a release build")
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
  message(STATUS "CUDA kernels: ${CBAM_OPS_CUDA_VERSION}, for ${CBAM_OPS_CUDA_TARGETS}")
else()
  message(STATUS "CUDA kernels: none, ${CBAM_OPS_CUDA_WHY_NOT}")
endif()

function(cbam_ops_add_cuda_kernels library)
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/core/cuda/*.cu")
  target_sources(${library} PRIVATE ${sources})
  target_compile_definitions(${library} PUBLIC CBAM_HAVE_CUDA=1)
  # For messages about an architecture that was not built.
  list(JOIN CBAM_OPS_CUDA_TARGETS " " architectures)
  set_property(SOURCE "${PROJECT_SOURCE_DIR}/csrc/core/cuda/kernels.cu" APPEND PROPERTY
    COMPILE_DEFINITIONS "CBAM_OPS_CUDA_ARCHITECTURES=\"${architectures}\"")
  target_compile_options(${library} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;${CBAM_OPS_CUDA_FLAGS}>
    $<$<AND:$<BOOL:${CBAM_OPS_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)
endfunction()
