# shellcheck shell=bash
# shellcheck disable=SC2154 # logs, out, dry_run and python are the caller's
# demo.sh sources this file: it runs steps in parallel, each on its cores, reports their progress,
# and skips finished steps. It reads $out, $logs, $dry_run and, after setup.sh, $python.

# One thread per device. CLIP and DALL-E train in parallel on one core each, because a second core
# helps the transformer little (batch 16: 52 pictures a second on one core, 56 with a device on each
# of two; threads are no better). It helps a codec: 217 on one core, 371 on two.
one_thread="--xla_cpu_multi_thread_eigen=false"
two_devices="--xla_force_host_platform_device_count=2"
cores="" # the cores that this process may use: 0,2-3 -> 0 2 3
if command -v taskset >/dev/null; then
  for range in $(taskset -cp $$ | sed 's/.*: //; s/,/ /g'); do
    cores+=" $(seq -s ' ' "${range%-*}" "${range#*-}")"
  done
fi

started=$SECONDS
running="" # names of the running steps; $logs/NAME.pid has their process ids
ran=0      # number of steps that were not finished before

# pinned N|both COMMAND…: replaces this (sub)shell by the command on the Nth core, or on the first
# two cores with a device on each.
pinned() {
  local core flags="${XLA_FLAGS:-} $one_thread"
  if [[ $1 != both ]]; then
    core=$(cut -s -d ' ' -f "$(($1 + 2))" <<<"$cores")
  else
    core=$(cut -s -d ' ' -f 2-3 <<<"$cores" | tr ' ' ,)
    if [[ ! $core || $core == *,* ]]; then flags+=" $two_devices"; fi
  fi
  shift
  export XLA_FLAGS="$flags" OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
  if [[ $core ]]; then
    exec taskset -c "$core" "$@"
  fi
  exec "$@"
}

# start NAME CORE|both|any COMMAND…: runs a step in the background, unless the same command is done.
start() {
  local name=$1 core=$2 command
  shift 2
  command=$(printf '%q ' python -m dalle_jax "$@")
  if [[ $dry_run ]]; then
    echo "$name (core $core): $command"
    return
  fi
  if [[ -f $logs/$name.done && $(head -n 1 "$logs/$name.done") == "$command" ]]; then
    return
  fi
  ran=$((ran + 1))
  rm -f "$logs/$name.done"
  log "$name: started (log: $logs/$name.log)"
  (
    if [[ $core == any ]]; then
      exec "$python" -m dalle_jax "$@"
    else
      pinned "$core" "$python" -m dalle_jax "$@"
    fi
  ) >"$logs/$name.out" 2>"$logs/$name.log" </dev/null &
  echo "$!" >"$logs/$name.pid"
  printf '%s\n%s\n' "$command" "$SECONDS" >"$logs/$name.started"
  running+=" $name"
}

# finish NAME: waits for a step and reports the progress of all; ends the demo if it failed.
finish() {
  local name=$1 code=0 reported=$SECONDS pid begun other
  [[ " $running " == *" $name "* ]] || return 0
  pid=$(<"$logs/$name.pid")
  while kill -0 "$pid" 2>/dev/null; do
    if ((SECONDS - reported >= every)); then
      progress
      reported=$SECONDS
    fi
    sleep 0.5
    for other in $running; do # report the failure of a parallel step at once
      [[ $other == "$name" ]] || kill -0 "$(<"$logs/$other.pid")" 2>/dev/null || finish "$other"
    done
  done
  wait "$pid" || code=$?
  running=${running/ $name/}
  if ((code)); then
    {
      printf '%serror: %s failed with exit code %s. The end of %s:\n' \
        "$clear" "$name" "$code" "$logs/$name.log"
      tail -qn 25 "$logs/$name.out" "$logs/$name.log"
    } >&2
    exit "$code"
  fi
  begun=$(tail -n 1 "$logs/$name.started")
  printf '%s\n%s\n' "$(head -n 1 "$logs/$name.started")" "$((SECONDS - begun))" >"$logs/$name.done"
  rm "$logs/$name.started" "$logs/$name.pid"
  log "$name: done in $(clock $((SECONDS - begun)))"
}

clock() {
  printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

log() {
  printf '%s[%s] %s\n' "$clear" "$(clock $((SECONDS - started)))" "$*"
}

# Prints the last line of every running step; on a terminal all of them on one rewritten line.
progress() {
  local name line all="" count
  count=$(wc -w <<<"$running")
  for name in $running; do
    line=$(cat "$logs/$name.log" "$logs/$name.out" 2>/dev/null | tr '\r' '\n' | grep . | tail -n 1 || true)
    if [[ $clear ]]; then
      all+="$name ${line:0:$((width / count - ${#name} - 4))} · "
    elif [[ $line ]]; then
      log "$name: ${line:0:160}"
    fi
  done
  if [[ $clear && $all ]]; then printf '%s%s' "$clear" "${all% · }"; fi
}
clear="" width=120 every=30
if [[ -t 1 ]]; then
  clear=$'\r\e[K' width=$(tput cols 2>/dev/null || echo 100) every=1
fi

# The end of the demo ends its steps; training saves at SIGTERM.
stop() {
  local name
  for name in $running; do kill "$(<"$logs/$name.pid")" 2>/dev/null || true; done
  for name in $running; do wait "$(<"$logs/$name.pid")" 2>/dev/null || true; done
}
trap stop EXIT
trap 'echo; echo "stopped; the same command continues"; exit 130' INT
trap 'exit 143' TERM
