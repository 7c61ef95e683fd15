#!/usr/bin/env bash
# From nothing to ranked pictures: data, a VQ-VAE, a discrete VAE, a CLIP, a DALL-E, and a page.
# About a quarter of an hour on two CPU cores. Run it again after an interruption: it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: bash launch/demo.sh [--data=shapes|emoji] [--size=SIZE] [--out=DIR] [--dry_run]

  --data=NAME  shapes: generated scenes (default) · emoji: real pictures (needs npm)
  --size=SIZE  which size of configs/{vqvae,dvae,clip,dalle}.py to train
               (default: demo for shapes, emoji_demo for emoji)
  --out=DIR    where everything goes (default: runs/demo, runs/demo-emoji)
  --dry_run    print the commands and do nothing

PYTHON=python3.13 bash launch/demo.sh   chooses the Python.
TEXT
}

data=shapes size="" out="" dry_run=""
for argument in "$@"; do
  case $argument in
    --data=shapes | --data=emoji) data=${argument#*=} ;;
    --size=?*) size=${argument#*=} ;;
    --out=?*) out=${argument#*=} ;;
    --dry_run) dry_run=1 ;;
    -h | --help) usage && exit ;;
    *)
      echo "error: $argument is not understood" >&2
      usage >&2
      exit 2
      ;;
  esac
done
if [[ $data == emoji ]]; then
  size=${size:-emoji_demo} out=${out:-runs/demo-emoji}
else
  size=${size:-demo} out=${out:-runs/demo}
fi
logs=$out/logs sets=$out/data

# One thread for each device. CLIP and DALL-E train beside each other, a core each: the transformer
# gains little from a second one (batch 16: 52 pictures a second on one core, 56 with a device on
# each of two; threads are no better). A codec does: 217 on one core, 371 on two.
one_thread="--xla_cpu_multi_thread_eigen=false"
two_devices="--xla_force_host_platform_device_count=2"
cores="" # the cores that we may use, not those that the machine has: 0,2-3 -> 0 2 3
if command -v taskset >/dev/null; then
  for range in $(taskset -cp $$ | sed 's/.*: //; s/,/ /g'); do
    cores+=" $(seq -s ' ' "${range%-*}" "${range#*-}")"
  done
fi

started=$SECONDS
running="" # names of the steps at work; $logs/NAME.pid has their process ids
ran=0      # steps that were not already done

# pinned N|both COMMAND…: runs the command in this (sub)shell's place on our Nth core, or on the
# first two with a device for each.
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

# start NAME CORE|both|any COMMAND…: in the background, unless it was finished before with these words.
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
  say "$name: started (log: $logs/$name.log)"
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

# finish NAME: waits for it, telling how all that run are getting on; ends the demo if it failed.
finish() {
  local name=$1 code=0 told=$SECONDS pid begun other
  [[ " $running " == *" $name "* ]] || return 0
  pid=$(<"$logs/$name.pid")
  while kill -0 "$pid" 2>/dev/null; do
    if ((SECONDS - told >= every)); then
      progress
      told=$SECONDS
    fi
    sleep 0.5
    for other in $running; do # one that failed beside it must not be found out minutes later
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
  say "$name: done in $(clock $((SECONDS - begun)))"
}

clock() {
  printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}

say() {
  printf '%s[%s] %s\n' "$clear" "$(clock $((SECONDS - started)))" "$*"
}

# The last line of every running step; on a terminal they share one line that is written over.
progress() {
  local name line all="" count
  count=$(wc -w <<<"$running")
  for name in $running; do
    line=$(cat "$logs/$name.log" "$logs/$name.out" 2>/dev/null | tr '\r' '\n' | grep . | tail -n 1 || true)
    if [[ $clear ]]; then
      all+="$name ${line:0:$((width / count - ${#name} - 4))} · "
    elif [[ $line ]]; then
      say "$name: ${line:0:160}"
    fi
  done
  if [[ $clear && $all ]]; then printf '%s%s' "$clear" "${all% · }"; fi
}
clear="" width=120 every=30
if [[ -t 1 ]]; then
  clear=$'\r\e[K' width=$(tput cols 2>/dev/null || echo 100) every=1
fi

# Whatever ends the demo ends what it started; training saves when it is asked to stop.
stop() {
  local name
  for name in $running; do kill "$(<"$logs/$name.pid")" 2>/dev/null || true; done
  for name in $running; do wait "$(<"$logs/$name.pid")" 2>/dev/null || true; done
}
trap stop EXIT
trap 'echo; echo "stopped; the same command continues"; exit 130' INT
trap 'exit 143' TERM

if [[ ! $dry_run ]]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh
  setup_python ""
  mkdir -p "$logs"
  if command -v flock >/dev/null; then # held by the steps too, should this script be killed
    exec 9>"$out/.lock"
    flock -n 9 || {
      echo "error: another demo is at work in $out, or a step of one that was killed:" >&2
      echo "wait for it, or find it with: ps x | grep $out" >&2
      exit 1
    }
  fi
fi

train() { # NAME CORE [FLAG…]: a stage by its own config
  local name=$1 core=$2
  shift 2
  start "$name" "$core" train "--config=configs/$name.py:size=$size" "--workdir=$out/$name" \
    "--config.data.data_dir=$sets" "$@"
}

# ---- Data ----------------------------------------------------------------------------------------
# As many scenes as the demo looks at; every other has one object: a quarter of an hour teaches that.
scenes=()
[[ $data$size == shapesdemo ]] &&
  scenes=(--num_train=20000 "--kinds=single,count,single,binding,single,relation")
start prepare any prepare "$data" --data_dir="$sets" --image_px=32 --workers=2 ${scenes[@]+"${scenes[@]}"}
finish prepare

# ---- The codec -----------------------------------------------------------------------------------
train vqvae both
finish vqvae
train dvae both "--config.init_from=$out/vqvae"
finish dvae

# ---- DALL-E on its codes, CLIP beside it ---------------------------------------------------------
train clip 1
train dalle 0 "--config.stages.dvae=$out/dvae"
finish dalle
finish clip

# ---- What has it learnt? -------------------------------------------------------------------------
# Of the networks as they are now: drawn again if any of them has just been trained.
((ran == 0)) || rm -f "$logs"/{evaluate,samples,completion,report}.done
stages=("--workdir=$out/dalle" "--clip=$out/clip") candidates=32
if [[ $data == shapes ]]; then
  # Single objects right at once, 120 prompts x 2 pictures: .45 (two seeds: .425, .479); guidance 3:
  # .31, guidance 1.5: .40. (With 16 and 24 prompts one and the same model was judged .23 and .43.)
  stages+=("--guidance=2" "--top_p=0.8" "--temperature=0.9")
  # 16 prompts a skill, as many held-out ones, 8 candidates each: about a minute of one core.
  start evaluate 1 evaluate --suite=shapes "${stages[@]}" --prompts_per_skill=16 --candidates=8 \
    --out="$out/evaluation"
else
  stages+=("--guidance=2" "--top_p=0.8" "--temperature=0.9") # as README's pictures were drawn
  # CLIP knows words that the hour's DALL-E seldom draws: its best of 512 are far better than of 32.
  [[ $size == emoji ]] && candidates=512
  start evaluate 1 evaluate --suite=retrieval --clip="$out/clip" --split=held_out \
    --out="$out/evaluation"
fi
start samples 0 sample "${stages[@]}" --prompts_file="launch/prompts/$data.txt" \
  --candidates="$candidates" --keep=8 --out="$out/samples"
finish samples
# The best picture of the first prompt, its lower half drawn anew; `sample` names folders so.
prompt=$(head -n 1 "launch/prompts/$data.txt")
start completion 0 sample "${stages[@]}" --prompt="$prompt" --image="$out/samples/${prompt// /-}/01.png" \
  --candidates=8 --keep=8 --out="$out/completion"
finish completion
finish evaluate

((ran == 0)) || rm -f "$logs/report.done"
start report any report --demo="$out"
finish report

if [[ $dry_run ]]; then
  exit
elif ((ran == 0)); then
  echo "nothing left to do: $out is finished (rm -r $out starts over)"
else
  say "finished"
fi
cat <<TEXT

  the page       $out/index.html
  the numbers    $out/metrics.json

Next:
  $python -m dalle_jax sample --workdir=$out/dalle --clip=$out/clip --candidates=32 --keep=8 \\
      --prompt="$(tail -n 1 "launch/prompts/$data.txt")" --out=$out/mine
  $python -m dalle_jax train --config=configs/dalle.py:size=$data --config.stages.dvae=$out/dvae \\
      --config.data.data_dir=$sets --workdir=runs/$data-dalle        # hours instead of minutes
TEXT
