#!/usr/bin/env bash
# Submits launch/slurm.sbatch: one run on the GPUs of several nodes of a SLURM cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/cluster.sh
source launch/cluster.sh

usage() {
  cat <<'TEXT'
usage: bash launch/slurm.sh --nodes=16 [--gpus_per_node=8] [--processes=node|gpu] [--time=24:00:00]
         [--partition=NAME] [--account=NAME] [--container=IMAGE] [--mounts=/data:/data] [--dry_run]
         -- ARGUMENTS OF train

  --processes  one process per node (default) or per GPU
  --container  an image with this package's dependencies, run by pyxis

At its time limit the run saves and exits; the same command continues it.
TEXT
}

nodes="" gpus_per_node=8 processes=node time="" partition="" account="" container="" mounts=""
arguments=("$@")
read_flags nodes gpus_per_node processes time partition account container mounts
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes=$nodes; expected 1 or more"
[[ $gpus_per_node =~ ^[1-9][0-9]*$ ]] || fail "--gpus_per_node=$gpus_per_node; expected 1 or more"
[[ $processes == node || $processes == gpu ]] || fail "--processes=$processes; use node or gpu"
check_mesh "$nodes" "$gpus_per_node"

exported="ALL,PROCESSES=$processes,DALLE_JAX_DIR=$PWD"
[[ $container ]] && exported+=",CONTAINER=$container"
options=(--nodes="$nodes" --gpus-per-node="$gpus_per_node" --export="$exported")
[[ $time ]] && options+=(--time="$time")
[[ $partition ]] && options+=(--partition="$partition")
[[ $account ]] && options+=(--account="$account")
before=()
[[ $mounts ]] && before=(env MOUNTS="$mounts") # not in --export, which splits at commas
act "${before[@]}" sbatch "${options[@]}" launch/slurm.sbatch "${train[@]}"
