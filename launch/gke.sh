#!/usr/bin/env bash
# Starts one run on many hosts of a GKE cluster: a JobSet with kubectl, or a workload with xpk.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/cluster.sh
source launch/cluster.sh

usage() {
  cat <<'TEXT'
usage: bash launch/gke.sh --name=NAME --image=IMAGE (--tpu=v5litepod-256 | --gpu=h100-80gb --nodes=16)
         [--with=jobset] [--gpus_per_node=8] [--dry_run] -- ARGUMENTS OF train
       bash launch/gke.sh … --with=xpk --cluster=CLUSTER --zone=ZONE [--project=PROJECT] [--slices=2]

  --image   a container image whose working directory is this checkout, with the package installed
  --with    jobset: a manifest for `kubectl apply` (default) · xpk: `xpk workload create`
  --slices  xpk only: number of TPU slices, joined by the data-centre network

If a host is preempted, all hosts restart and continue from the last checkpoint.
TEXT
}

name="" image="" tpu="" gpu="" nodes="" gpus_per_node=8 with=jobset cluster="" zone="" project=""
slices=1
arguments=("$@")
read_flags name image tpu gpu nodes gpus_per_node with cluster zone project slices
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: at most 40 lower-case letters, digits, dashes"
[[ $image ]] || fail "no --image=IMAGE"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices; expected 1 or more"
if [[ $tpu && ! $gpu ]]; then
  tpu_slice "$tpu"
  hosts=$((hosts * slices))
elif [[ $gpu && ! $tpu && $nodes =~ ^[1-9][0-9]*$ && $gpus_per_node =~ ^[1-9][0-9]*$ ]]; then
  hosts=$nodes per_host=$gpus_per_node
else
  fail "give --tpu=v5litepod-256, or --gpu=h100-80gb with --nodes=N"
fi
check_mesh "$hosts" "$per_host"

if [[ $with == xpk ]]; then
  [[ $cluster && $zone ]] || fail "--with=xpk needs --cluster=CLUSTER and --zone=ZONE"
  options=(--cluster="$cluster" --zone="$zone")
  [[ $project ]] && options+=(--project="$project")
  options+=(--workload="$name" --docker-image="$image" --max-restarts=10)
  if [[ $tpu ]]; then
    options+=(--tpu-type="$tpu" --num-slices="$slices")
  else
    options+=(--device-type="$gpu-$gpus_per_node" --num-nodes="$nodes")
  fi
  act xpk workload create "${options[@]}" \
    --command="python -m dalle_jax train --distributed $(quoted "${train[@]}")"
  exit
fi
[[ $with == jobset ]] || fail "--with=$with; use jobset or xpk"
((slices == 1)) || fail "--slices=$slices needs --with=xpk, which joins slices"

if [[ $tpu ]]; then
  # GKE announces all TPU hosts to each other.
  others=--distributed resource=google.com/tpu
  selector="cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology"
else
  # shellcheck disable=SC2016  # Kubernetes sets the variable in the pod
  others="--coordinator=$name-train-0-0.$name:8476 --process_count=$hosts"' --process_id="$JOB_COMPLETION_INDEX"'
  resource=nvidia.com/gpu
  selector="cloud.google.com/gke-accelerator: nvidia-$gpu"
fi
manifest=$(
  cat <<YAML
# $hosts hosts x $per_host
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                $selector
              containers:
                - name: train
                  image: $image
                  ports:
                    - containerPort: 8476
                  command:
                    - bash
                    - -c
                    - |
                      exec python -m dalle_jax train $others $(quoted "${train[@]}")
                  resources:
                    limits:
                      $resource: $per_host
                    requests:
                      $resource: $per_host
YAML
)
if [[ $dry_run ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
