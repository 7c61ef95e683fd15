#!/usr/bin/env bash
# Trains the smoke DALL-E in several processes on this machine, after its data and codec. The
# processes communicate through localhost as hosts do through their network.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/local_cluster.sh N [--devices=D] [--out=DIR] [--port=P] [--dry_run] [-- FLAG…]

  N            processes, e.g. 4
  --devices=D  simulated CPU devices per process (default: 2)
  --out=DIR    folder for all results (default: runs/local_cluster)
  --port=P     port of process 0 (default: a free one)
  --dry_run    print the commands and do nothing
  -- FLAG…     for every process, e.g. -- --config.train.steps=200 --reshard

The output lines of process i begin with [pi]. The script prints every process id:

  kill PID      all processes save the same step and exit with code 143; the same command continues
  kill -9 PID   the other processes exit within 20 seconds and print the reason; the same command
                continues from the last checkpoint, with another N after `-- --reshard`
  Ctrl-C        like kill; a second Ctrl-C ends the processes at once

N x D must divide the batch of 16. PYTHON=python3.13 bash launch/local_cluster.sh 4 selects the
Python.
TEXT
}

count="" devices=2 out=runs/local_cluster port="" dry_run=""
while (($#)); do
  case $1 in
    [1-9] | [1-9][0-9]) count=$1 ;;
    --devices=[1-9] | --devices=[1-9][0-9]) devices=${1#*=} ;;
    --out=?*) out=${1#*=} ;;
    --port=[1-9]*) port=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    --)
      shift
      break
      ;;
    *)
      echo "error: $1 is not understood" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if [[ ! $count ]]; then
  echo "error: how many processes? e.g. bash launch/local_cluster.sh 4" >&2
  exit 2
fi

pids=() names=() interrupted="" stopped=""

# step NAME COMMAND…: starts the command in the background; its lines begin with [NAME].
step() {
  local name=$1
  shift
  if [[ $dry_run ]]; then
    echo "$name: XLA_FLAGS=\"$XLA_FLAGS\" $(printf '%q ' python -m dalle_jax "$@")"
    return
  fi
  "$python" -u -m dalle_jax "$@" > >(prefix "$name") 2>&1 </dev/null &
  pids+=("$!") names+=("$name")
  echo "[$name] is process $!"
}

prefix() {
  # Ctrl-C must not end awk, which prints the processes' last lines. Gloo's log lines are dropped.
  trap '' INT TERM
  awk -v name="[$1] " '!/^\[Gloo\]/ { print name $0; fflush() }'
}

# finish: waits for all started processes; exits if one of them failed.
finish() {
  local pid code worst=0 i=0
  for pid in "${pids[@]}"; do
    while :; do
      interrupted="" code=0
      wait "$pid" || code=$?
      [[ $interrupted ]] || break # otherwise a signal interrupted `wait`
    done
    if ((code)); then echo "[${names[i]}] process $pid ended with exit code $code"; fi
    if ((code > worst)); then worst=$code; fi
    i=$((i + 1))
  done
  sleep 0.2 # the last lines are still on their way through awk
  pids=() names=()
  if [[ $stopped ]]; then exit "$stopped"; fi
  if ((worst)); then exit "$worst"; fi
}

# The end of this script ends its processes.
stop() {
  interrupted=1
  if ((${#pids[@]} == 0)); then
    exit "$1"
  elif [[ $stopped ]]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  else
    echo "stopping: every process saves the same step; a second signal ends them at once"
    kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
  stopped=$1
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap '((${#pids[@]} == 0)) || kill -KILL "${pids[@]}" 2>/dev/null || true' EXIT

export XLA_FLAGS=""
if [[ ! $dry_run ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  setup_python ""
  if [[ ! $port ]]; then
    port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
  fi
fi

# ---- Data and codec: one process -----------------------------------------------------------------
step data prepare shapes --data_dir="$out/data" --image_px=32 --num_train=2000 --num_eval=200
[[ $dry_run ]] || finish
step codec train --config=configs/dvae.py:size=smoke --workdir="$out/dvae" \
  --config.data.data_dir="$out/data"
[[ $dry_run ]] || finish

# ---- DALL-E: N processes -------------------------------------------------------------------------
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices --xla_cpu_multi_thread_eigen=false"
export JAX_PLATFORMS=cpu # the processes would compete for a GPU
for ((i = 0; i < count; i++)); do
  step "p$i" train --config=configs/dalle.py:size=smoke --workdir="$out/dalle" \
    --config.data.data_dir="$out/data" --config.stages.dvae="$out/dvae" \
    --coordinator="localhost:${port:-8476}" --process_count="$count" --process_id="$i" \
    --start_timeout_s=120 --heartbeat_timeout_s=20 "$@"
done
if [[ ! $dry_run ]]; then
  finish
  echo "trained by $count processes: $out/dalle (metrics.jsonl, previews/)"
fi
