# cbam_ops with its CUDA kernels on a slim Python image: docs/gpus.md.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY . /source
# nvcc comes from pip and goes with this stage. The image may run on other machines than this one:
# every instruction set.
RUN CBAM_OPS_CUDA=ON CBAM_OPS_INSTRUCTION_SETS=ALL pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
COPY --from=build /wheels /wheels
# The wheel says for which release of TensorFlow it was built.
RUN pip install --no-cache-dir 'tensorflow[and-cuda]' /wheels/*.whl && rm -r /wheels
CMD ["cbam-ops", "info"]
