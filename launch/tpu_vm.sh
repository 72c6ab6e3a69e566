#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice, step by step:
#   export NAME=vit-jax-ext ZONE=europe-west4-b TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create [--spot]    asks for the slice
#   launch/tpu_vm.sh install            copies the repository to all its hosts and installs it there
#   launch/tpu_vm.sh train ARGS...      trains; arguments are those of `main.py train`, the workdir on a shared mount
#   launch/tpu_vm.sh log                follows what process 0 says, which goes on when the connection ends
#   launch/tpu_vm.sh delete             gives the slice back
# With --dry-run in front the commands are only printed.
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
fi
: "${NAME:?of the slice}" "${ZONE:?of the slice, e.g. europe-west4-b}"

run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  if [[ -z $dry_run ]]; then "$@"; fi
}

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" "$@"
}

step=${1-}
shift || true
case $step in
  create)
    tpu create --accelerator-type="${TYPE:?e.g. v5litepod-16}" --version="${VERSION:?e.g. v2-alpha-tpuv5-lite}" "$@"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    run git archive --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:vit_jax_ext.tar.gz" --zone="$ZONE" --worker=all
    tpu ssh --worker=all --command='set -e
      mkdir -p vit_jax_ext && cd vit_jax_ext && tar -xzf ../vit_jax_ext.tar.gz
      python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --python 3.11
      python3 -m uv pip install --quiet -e ".[train,tpu]"'
    ;;
  train)
    arguments=$(printf ' %q' --distributed "$@")
    tpu ssh --worker=all --command="cd vit_jax_ext
      nohup .venv/bin/python main.py train$arguments >train.log 2>&1 </dev/null &
      tail --follow --pid=\$! train.log"
    ;;
  log)
    tpu ssh --worker=0 --command='tail --follow vit_jax_ext/train.log'
    ;;
  delete)
    tpu delete --quiet
    ;;
  *)
    echo "error: step '$step' is none of create, install, train, log, delete" >&2
    exit 2
    ;;
esac
