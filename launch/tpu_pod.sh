#!/usr/bin/env bash
# TPU VM pod slices: create one as a queued resource, install on all its hosts, train, stop, delete.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/cluster.sh
source launch/cluster.sh

usage() {
  cat <<'TEXT'
usage: bash launch/tpu_pod.sh ACTION --name=NAME --zone=ZONE --type=v5litepod-256 [--dry_run]
         [--project=PROJECT] [--spot=yes] [-- ARGUMENTS OF train]

  create   requests the slice, which is created when capacity is free
  state    WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, FAILED, SUSPENDED
  setup    copies this checkout to every host, installs it, runs doctor on all
  train    starts or continues `python -m dalle_jax train --distributed` on every host
  log      follows the log of the first host
  stop     saves and ends the run; the next `train` continues it
  delete   deletes the slice, which ends its costs

  bash launch/tpu_pod.sh train --name=d12b --zone=us-west4-a --type=v5litepod-256 \
      -- --config=configs/dalle_12b.py --workdir=gs://BUCKET/dalle
TEXT
}

action=${1:-} name="" zone="" type="" project="" spot=""
shift || true
arguments=("$@")
[[ $action == -h || $action == --help ]] && usage && exit
case $action in
  create | state | setup | train | log | stop | delete) ;;
  *) refuse "${action:-no action}" ;;
esac
read_flags name zone type project spot
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits, dashes"
[[ $zone ]] || fail "no --zone=ZONE, e.g. us-west4-a"
tpu_slice "$type"

location=(--zone="$zone")
[[ $project ]] && location+=(--project="$project")

# on WORKER COMMAND : runs a command on one host, or on all of them.
on() {
  act gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" --worker="$1" --command="$2"
}

case $action in
  create)
    options=(--accelerator-type="$type" --runtime-version="$runtime")
    [[ $spot ]] && options+=(--spot)
    act gcloud compute tpus queued-resources create "$name" --node-id="$name" "${location[@]}" "${options[@]}"
    ;;
  state)
    act gcloud compute tpus queued-resources describe "$name" "${location[@]}" --format="value(state.state)"
    ;;
  setup)
    archive=$(mktemp -u)/dalle_jax.tar.gz
    [[ $dry_run ]] && archive=/tmp/dalle_jax.tar.gz
    act mkdir -p "$(dirname "$archive")"
    act git archive --format=tar.gz --output="$archive" HEAD
    act gcloud compute tpus tpu-vm scp "$archive" "$name": "${location[@]}" --worker=all
    # The image's Python is 3.10.
    on all "sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv"
    on all "mkdir -p dalle_jax && tar -xzf dalle_jax.tar.gz -C dalle_jax && cd dalle_jax && python3.11 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
    on all "cd dalle_jax && .venv/bin/python -m dalle_jax doctor --no_bench"
    ;;
  train)
    check_mesh "$hosts" "$per_host"
    # setsid: the run outlives the connection. `stop` signals the process id in train.pid.
    on all "cd dalle_jax && { setsid nohup .venv/bin/python -m dalle_jax train --distributed $(quoted "${train[@]}") >>train.log 2>&1 </dev/null & echo \$! >train.pid; }"
    ;;
  log) on 0 "tail -n 50 -F dalle_jax/train.log" ;;
  stop) on all "kill -TERM \$(cat dalle_jax/train.pid)" ;;
  delete) act gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force ;;
esac
