# One source, compiled once per instruction set and data type; kernels.cc picks at run time.
#
# Each object sees CBAM_LEVEL_<BASELINE|AVX2|AVX512>=1 and CBAM_TYPE_<F32|F16|BF16|F64>=1. Files of
# the library proper see CBAM_HAVE_AVX2 and CBAM_HAVE_AVX512 where those levels were compiled.

# Sums are written in the order they are to be taken: no contraction behind our back (a fused
# multiply-add on one side only would break ties between equal maxima), no fast-math. That errno
# and the trap flags are not looked at changes no result and lets loops be vectorised.
set(CBAM_OPS_KERNEL_FLAGS -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)

set(CBAM_OPS_LEVELS BASELINE)
set(CBAM_OPS_FLAGS_BASELINE "")
set(CBAM_OPS_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(CBAM_OPS_FLAGS_AVX512
  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
  #if !defined(__x86_64__)
  #error other architecture
  #endif
  int main() {}" CBAM_OPS_X86_64)
if(CBAM_OPS_X86_64)
  set(CBAM_OPS_INSTRUCTION_SETS "AVX2;AVX512" CACHE STRING
    "Instruction sets to compile for besides the baseline: AVX2, AVX512, both, or empty")
  list(APPEND CBAM_OPS_LEVELS ${CBAM_OPS_INSTRUCTION_SETS})
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
