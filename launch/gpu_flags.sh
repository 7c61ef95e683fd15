# shellcheck shell=bash
# Sourced by the launchers of GPUs: what XLA is told for training on many of them. The flags are
# those of NVIDIA's JAX-Toolbox for transformers; a name that XLA does not know ends the program,
# so tests/test_launchers.py tries them on the installed one.

gpu_flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true # gather the next layer while this one computes
  --xla_gpu_all_gather_combine_threshold_bytes=268435456
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
)
export XLA_FLAGS="${XLA_FLAGS:-} ${gpu_flags[*]}"
# NCCL and cuDNN need what is left.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
