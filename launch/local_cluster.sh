#!/usr/bin/env bash
# A job of several processes on this machine, to see it work: the smoke DALL-E, its data and codec
# first. The processes talk through localhost as hosts would through their network.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/local_cluster.sh N [--devices=D] [--out=DIR] [--port=P] [--dry_run] [-- FLAG…]

  N            processes, e.g. 4
  --devices=D  faked CPU devices of each (default: 2)
  --out=DIR    where everything goes (default: runs/local_cluster)
  --port=P     of process 0 (default: a free one)
  --dry_run    print the commands and do nothing
  -- FLAG…     for every process, e.g. -- --config.train.steps=200 --reshard

Lines of process i begin with [pi]; the numbers are those of the operating system, too:

  kill PID      all save the same step and end with 143; the same command goes on
  kill -9 PID   the others end within 20 seconds, saying why; the same command goes on from the
                last checkpoint, with another N after `-- --reshard`
  Ctrl-C        like kill; twice: at once

N x D must divide the batch of 16. PYTHON=python3.13 bash launch/local_cluster.sh 4 chooses the
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

# step NAME COMMAND…: starts it in the background; its lines begin with [NAME].
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
  # Ctrl-C is for the processes: what they say while they end is to be seen. Without gloo's chatter.
  trap '' INT TERM
  awk -v name="[$1] " '!/^\[Gloo\]/ { print name $0; fflush() }'
}

# finish: waits for all that were started; exits if one of them failed.
finish() {
  local pid code worst=0 i=0
  for pid in "${pids[@]}"; do
    while :; do
      interrupted="" code=0
      wait "$pid" || code=$?
      [[ $interrupted ]] || break # else `wait` only told of the signal
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

# Whatever ends this script ends what it started.
stop() {
  interrupted=1
  if ((${#pids[@]} == 0)); then
    exit "$1"
  elif [[ $stopped ]]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  else
    echo "stopping: every process saves the same step; once more ends them at once"
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
export JAX_PLATFORMS=cpu # a GPU here would belong to all of them
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
