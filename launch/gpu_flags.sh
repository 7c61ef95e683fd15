# shellcheck shell=bash
# The GPU launchers source this file: XLA's flags for training on many GPUs, from NVIDIA's
# JAX-Toolbox for transformers. A flag that XLA does not know ends the program, so
# tests/test_launchers.py tries them on the installed XLA.

gpu_flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true # gather the next layer while this one computes
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
)
export XLA_FLAGS="${XLA_FLAGS:-} ${gpu_flags[*]}"
# NCCL and cuDNN need the rest of the memory.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
