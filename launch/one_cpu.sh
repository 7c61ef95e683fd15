#!/usr/bin/env bash
# Trains on one core of this machine: two runs on a core each are faster than two that share both.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/cluster.sh
source launch/cluster.sh

usage() {
  cat <<'TEXT'
usage: bash launch/one_cpu.sh [--core=0] [--dry_run] -- ARGUMENTS OF train

  bash launch/one_cpu.sh --core=1 -- --config=configs/dvae.py:size=smoke --workdir=runs/dvae
TEXT
}

core=0
arguments=("$@")
read_flags core
[[ $core =~ ^[0-9]+$ ]] || fail "--core=$core; expected a number"
check_mesh 1 1
export JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export XLA_FLAGS="${XLA_FLAGS:-} --xla_cpu_multi_thread_eigen=false"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: see setup.sh
pin=()
command -v taskset >/dev/null && pin=(taskset -c "$core")
[[ $dry_run ]] && printf 'export %s\n' "$(quoted JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 \
  OPENBLAS_NUM_THREADS=1 "XLA_FLAGS=$XLA_FLAGS" "GLIBC_TUNABLES=$GLIBC_TUNABLES")"
act exec "${pin[@]}" "$python" -m dalle_jax train "${train[@]}"
