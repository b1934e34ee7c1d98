// cbam_ops._core.cuda: the CUDA kernels on device pointers.
#ifndef CBAM_OPS_PYTHON_CUDA_BINDINGS_H_
#define CBAM_OPS_PYTHON_CUDA_BINDINGS_H_

#include <pybind11/pybind11.h>

namespace cbam_ops {
namespace python {

// Adds the submodule `cuda`; in a build without CUDA it holds only `built = False`.
void BindCuda(pybind11::module_& module);

}  // namespace python
}  // namespace cbam_ops

#endif  // CBAM_OPS_PYTHON_CUDA_BINDINGS_H_
