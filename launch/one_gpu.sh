#!/usr/bin/env bash
# Trains on the GPUs of this machine in one process; never falls back to the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/cluster.sh
source launch/cluster.sh
# shellcheck source=launch/gpu_flags.sh
source launch/gpu_flags.sh

usage() {
  cat <<'TEXT'
usage: bash launch/one_gpu.sh [--gpus=1] [--dry_run] -- ARGUMENTS OF train

  bash launch/one_gpu.sh -- --config=configs/dalle.py:size=single_gpu --config.stages.dvae=runs/dvae \
      --workdir=runs/dalle

PYTHON=.venv/bin/python bash launch/one_gpu.sh …   selects the Python.
TEXT
}

gpus=1
arguments=("$@")
read_flags gpus
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus=$gpus; expected 1 or more"
check_mesh 1 "$gpus"
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}
# cuda and not "cuda,cpu": without a GPU the run must fail instead of being a hundred times slower.
export CUDA_VISIBLE_DEVICES JAX_PLATFORMS=cuda
[[ $dry_run ]] && printf 'export %s\n' "$(quoted "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" \
  "JAX_PLATFORMS=cuda" "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" "XLA_FLAGS=$XLA_FLAGS")"
act "$python" -m dalle_jax doctor --no_bench
act exec "$python" -m dalle_jax train "${train[@]}"
