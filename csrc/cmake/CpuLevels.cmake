# One source, compiled once per instruction set and data type; kernels.cc picks at run time.
#
# Each object sees CBAM_LEVEL_<BASELINE|AVX2|AVX512>=1 and CBAM_TYPE_<F32|F16|BF16|F64>=1. Files of
# the library proper see CBAM_HAVE_AVX2 and CBAM_HAVE_AVX512 where those levels were compiled.

# Sums are written in the order they are to be taken: no contraction behind our back (a fused
# multiply-add on one side only would break ties between equal maxima), no fast-math. That errno
# and the trap flags are not looked at changes no result and lets loops be vectorised.
set(CBAM_OPS_KERNEL_FLAGS -ffp-contract=off -fno-math-errno -fno-trapping-math)
# With a sanitizer -O3 takes three times as long to compile as -O1; the tests run for seconds.
if(NOT CMAKE_CXX_FLAGS MATCHES "-fsanitize=")
  list(PREPEND CBAM_OPS_KERNEL_FLAGS -O3)
endif()

set(CBAM_OPS_LEVELS BASELINE)
set(CBAM_OPS_FLAGS_BASELINE "")
set(CBAM_OPS_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(CBAM_OPS_FLAGS_AVX512
  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

# The baseline of other processors is their only level.
include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
  #if !defined(__x86_64__)
  #error other architecture
  #endif
  int main() {}" CBAM_OPS_X86_64)
if(CBAM_OPS_X86_64)
  set(CBAM_OPS_INSTRUCTION_SETS "AUTO" CACHE STRING
    "Besides the baseline: AUTO (the best of this machine), ALL, or a list (AVX2;AVX512), also empty")
  set(levels "${CBAM_OPS_INSTRUCTION_SETS}")
  if(levels STREQUAL "ALL")
    set(levels AVX2 AVX512)
  elseif(levels STREQUAL "AUTO")
    set(levels "")
    set(needs_AVX2 avx2 fma f16c)
    set(needs_AVX512 ${needs_AVX2} avx512f avx512bw avx512dq avx512vl)
    file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
    separate_arguments(flags)
    foreach(level IN ITEMS AVX2 AVX512)
      set(missing ${needs_${level}})
      list(REMOVE_ITEM missing ${flags})
      if(NOT missing)
        set(levels ${level})
      endif()
    endforeach()
  endif()
  foreach(level IN LISTS levels)
    if(NOT level MATCHES "^AVX(2|512)$")
      message(FATAL_ERROR "CBAM_OPS_INSTRUCTION_SETS must be AUTO, ALL or a list of AVX2 and AVX512, "
        "got '${CBAM_OPS_INSTRUCTION_SETS}'.")
    endif()
  endforeach()
  list(APPEND CBAM_OPS_LEVELS ${levels})
endif()

function(cbam_ops_add_cpu_levels library source)
  foreach(level IN LISTS CBAM_OPS_LEVELS)
    if(NOT level STREQUAL "BASELINE")
      target_compile_definitions(${library} PRIVATE CBAM_HAVE_${level}=1)
    endif()
    if(NOT EXISTS "${source}")
      continue()
    endif()
    foreach(type IN ITEMS F32 F16 BF16 F64)
      string(TOLOWER "level_${level}_${type}" object)
      add_library(${object} OBJECT "${source}")
      target_link_libraries(${object} PRIVATE cbam_flags)
      target_compile_definitions(${object} PRIVATE CBAM_LEVEL_${level}=1 CBAM_TYPE_${type}=1)
      target_compile_options(${object} PRIVATE ${CBAM_OPS_KERNEL_FLAGS} ${CBAM_OPS_FLAGS_${level}})
      target_sources(${library} PRIVATE $<TARGET_OBJECTS:${object}>)
    endforeach()
  endforeach()
endfunction()
