# shellcheck shell=bash
# The launchers source this file: it reads flags, checks the mesh, and runs or prints commands.
#
#   PYTHON=python3.13   a Python with this package, which checks the mesh (default: python3)

python=${PYTHON:-python3}
dry_run=""

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# read_flags NAME… : sets a variable for each --NAME=VALUE in the caller's `arguments`, and `train`
# to the words after `--`. --dry_run and --help are always accepted.
read_flags() {
  local _word _flag # not `name`: a caller has a flag of that name
  train=()
  while ((${#arguments[@]})); do
    _word=${arguments[0]}
    arguments=("${arguments[@]:1}")
    case $_word in
      --) train=("${arguments[@]}") && break ;;
      --dry_run) dry_run=1 ;;
      -h | --help) usage && exit ;;
      --*=*)
        _flag=${_word%%=*} _flag=${_flag#--}
        [[ " $* " == *" $_flag "* ]] || refuse "$_word"
        printf -v "$_flag" '%s' "${_word#*=}"
        ;;
      *) refuse "$_word" ;;
    esac
  done
}

refuse() {
  printf 'error: %s is not understood\n' "$1" >&2
  usage >&2
  exit 2
}

# act COMMAND… : runs the command; with --dry_run prints it with shell quotes.
act() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# quoted WORD… : the words on one line, with quotes only if a shell needs them.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# check_mesh HOSTS DEVICES_PER_HOST : refuses a config whose mesh does not fit the devices.
check_mesh() {
  local argument config=()
  for argument in "${train[@]}"; do
    [[ $argument == --config* ]] && config+=("$argument")
  done
  ((${#config[@]})) || fail "no --config after --; write … -- --config=configs/dalle.py --workdir=DIR"
  [[ " ${train[*]} " == *" --workdir="* ]] || fail "no --workdir=DIR after --"
  JAX_PLATFORMS=cpu "$python" -m dalle_jax mesh "${config[@]}" --hosts="$1" --devices_per_host="$2" >&2 || exit
}

# tpu_slice TYPE : sets chips, hosts, per_host (chips per host), topology, accelerator (GKE's name)
# and runtime (the TPU VM's image). v4 and v5p types count TensorCores, two per chip; v5litepod and
# v6e types count chips.
# shellcheck disable=SC2034  # the callers use the variables
tpu_slice() {
  local family=${1%-*} size=${1##*-}
  [[ $1 =~ ^(v4|v5litepod|v5p|v6e)-[0-9]+$ ]] ||
    fail "--type=$1 is not a TPU slice; write v4-256, v5litepod-256, v5p-256 or v6e-256"
  case $family in
    v4) chips=$((size / 2)) accelerator=tpu-v4-podslice runtime=tpu-ubuntu2204-base ;;
    v5p) chips=$((size / 2)) accelerator=tpu-v5p-slice runtime=v2-alpha-tpuv5 ;;
    v5litepod) chips=$size accelerator=tpu-v5-lite-podslice runtime=v2-alpha-tpuv5-lite ;;
    v6e) chips=$size accelerator=tpu-v6e-slice runtime=v2-alpha-tpuv6e ;;
  esac
  per_host=4
  case $family:$chips in
    v5litepod:[148] | v6e:[148]) per_host=$chips ;;&  # one machine
    v5litepod:1 | v6e:1) topology=1x1 ;;
    v5litepod:4 | v6e:4) topology=2x2 ;;
    v5litepod:8 | v6e:8) topology=2x4 ;;
    v5litepod:16 | v6e:16) topology=4x4 ;;
    v5litepod:32 | v6e:32) topology=4x8 ;;
    v5litepod:64 | v6e:64) topology=8x8 ;;
    v5litepod:128 | v6e:128) topology=8x16 ;;
    v5litepod:256 | v6e:256) topology=16x16 ;;
    v4:4 | v5p:4) topology=2x2x1 ;;
    v4:8 | v5p:8) topology=2x2x2 ;;
    v4:16 | v5p:16) topology=2x2x4 ;;
    v4:32 | v5p:32) topology=2x4x4 ;;
    v4:64 | v5p:64) topology=4x4x4 ;;
    v4:128 | v5p:128) topology=4x4x8 ;;
    v4:256 | v5p:256) topology=4x8x8 ;;
    v4:512 | v5p:512) topology=8x8x8 ;;
    v4:1024 | v5p:1024) topology=8x8x16 ;;
    *) fail "--type=$1: no slice has $chips chips; use a power of two, at most 256 (v5litepod, v6e)" ;;
  esac
  hosts=$((chips / per_host))
}
