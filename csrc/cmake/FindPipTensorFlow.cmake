# The TensorFlow that pip installed: headers, libraries, and the flags it was compiled with.
#
# The build backend passes CBAM_OPS_TENSORFLOW_DIR and CBAM_OPS_TENSORFLOW_VERSION; without it the
# same finder is run from here. TensorFlow is never imported.
#
# Defines: pip_tensorflow::framework (ops), pip_tensorflow::cc (XLA, on top of ::framework),
#          CBAM_OPS_TENSORFLOW_FLAGS, CBAM_OPS_TENSORFLOW_HAS_XLA (2.18 and 2.19 lack the headers
#          of XLA's custom calls).

if(NOT CBAM_OPS_TENSORFLOW_DIR OR NOT CBAM_OPS_TENSORFLOW_VERSION)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/build_backend/find_tensorflow.py"
    OUTPUT_VARIABLE found
    ERROR_VARIABLE error
    RESULT_VARIABLE status
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${error}")
  endif()
  string(REPLACE "\n" ";" found "${found}")
  list(GET found 0 CBAM_OPS_TENSORFLOW_DIR)
  list(GET found 1 CBAM_OPS_TENSORFLOW_VERSION)
endif()
message(STATUS "TensorFlow ${CBAM_OPS_TENSORFLOW_VERSION}: ${CBAM_OPS_TENSORFLOW_DIR}")

# The C++ ABI of the wheels; the alignment that its Eigen was built for, which is part of the ABI of
# tensors; and NDEBUG in every build type, because reference counts are laid out differently without.
set(CBAM_OPS_TENSORFLOW_FLAGS
  -D_GLIBCXX_USE_CXX11_ABI=1 -DEIGEN_MAX_ALIGN_BYTES=64 -DNDEBUG)

set(framework "${CBAM_OPS_TENSORFLOW_DIR}/libtensorflow_framework.so.2")
set(cc "${CBAM_OPS_TENSORFLOW_DIR}/libtensorflow_cc.so.2")
if(NOT EXISTS "${framework}")
  message(FATAL_ERROR "There is no ${framework}: this TensorFlow cannot be built against. "
    "Use the wheel for Linux (pip install tensorflow).")
endif()

set(CBAM_OPS_TENSORFLOW_HAS_XLA OFF)
if(EXISTS "${CBAM_OPS_TENSORFLOW_DIR}/include/xla/ffi/api/ffi.h")
  set(CBAM_OPS_TENSORFLOW_HAS_XLA ON)
endif()

add_library(pip_tensorflow::framework SHARED IMPORTED)
set_target_properties(pip_tensorflow::framework PROPERTIES IMPORTED_LOCATION "${framework}")
target_include_directories(pip_tensorflow::framework SYSTEM INTERFACE
  "${CBAM_OPS_TENSORFLOW_DIR}/include")
target_compile_options(pip_tensorflow::framework INTERFACE ${CBAM_OPS_TENSORFLOW_FLAGS})

add_library(pip_tensorflow::cc SHARED IMPORTED)
set_target_properties(pip_tensorflow::cc PROPERTIES IMPORTED_LOCATION "${cc}")
target_include_directories(pip_tensorflow::cc SYSTEM INTERFACE
  "${CBAM_OPS_TENSORFLOW_DIR}/include"
  "${CBAM_OPS_TENSORFLOW_DIR}/include/external/highwayhash"
  "${CBAM_OPS_TENSORFLOW_DIR}/include/external/farmhash_archive/src")
target_compile_options(pip_tensorflow::cc INTERFACE ${CBAM_OPS_TENSORFLOW_FLAGS})
