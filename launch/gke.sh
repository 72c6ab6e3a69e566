#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster that has JobSet; arguments are those of `main.py train`:
#   IMAGE=REGISTRY/vit_jax_ext BUCKET=NAME launch/gke.sh --config=configs/crossvit.py:18_dagger --workdir=/bucket/run
# IMAGE holds the repository as its working directory, installed by pip install -e '.[train,tpu]'. BUCKET, with a
# hierarchical namespace, is mounted as /bucket. Other variables and their defaults: NAME=vit-jax-ext HOSTS=4
# CHIPS=4 (of each host) ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4.
#   launch/gke.sh --dry-run ARGS...   prints the commands and the manifest
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
fi
: "${IMAGE:?the container image to run, e.g. europe-docker.pkg.dev/PROJECT/REPOSITORY/vit_jax_ext}"
: "${BUCKET:?the storage bucket for data and checkpoints}"
NAME=${NAME:-vit-jax-ext} HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4}

PODS=
for ((i = 0; i < HOSTS; i++)); do
  PODS+=,$NAME-slice-0-$i
done
PODS=${PODS#,}
ARGUMENTS= # as YAML strings, one a line
for argument in "$@"; do
  ARGUMENTS+=$'\n'"                    - '${argument//\'/\'\'}'"
done

manifest=$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
for word in NAME HOSTS PODS IMAGE BUCKET CHIPS ACCELERATOR TOPOLOGY; do
  manifest=${manifest//"$word"/"${!word}"}
done
manifest=${manifest/$'\n                    - ARGUMENTS'/"$ARGUMENTS"}

echo "+ kubectl apply --filename - <<<MANIFEST" >&2
if [[ $dry_run ]]; then
  printf '%s\n' "$manifest"
else
  kubectl apply --filename - <<<"$manifest"
fi
echo "now: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" >&2
echo "end: kubectl delete jobset $NAME" >&2
