#!/usr/bin/env bash
#SBATCH --job-name=vit_jax_ext
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Trains on all GPUs of several nodes, one process a node; arguments are those of `main.py train`:
#   sbatch --nodes=4 launch/slurm.sh --config=configs/crossvit.py:18_dagger --workdir=/shared/run
# to be submitted from the repository, with its .venv (pip install -e '.[train,cuda]') or another PYTHON, all on a file system
# that the nodes share.
# Five minutes before its time is up the job is asked to save; then, as after a preemption, it queues again by itself.
#   launch/slurm.sh --dry-run ARGS...   prints the commands
set -euo pipefail

dry_run=
if [[ ${1-} == --dry-run ]]; then
  dry_run=1
  shift
  SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST-'NODE[0-1]'}
fi
if [[ -z ${SLURM_JOB_NODELIST-} ]]; then
  echo "error: no SLURM job here; submit with sbatch $0, or look with $0 --dry-run" >&2
  exit 2
fi

run() {
  printf '+' >&2
  printf ' %q' "$@" >&2
  printf '\n' >&2
  if [[ -z $dry_run ]]; then "$@"; fi
}

hosts=$SLURM_JOB_NODELIST
if command -v scontrol >/dev/null; then
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)
fi
status=0
run cd "${SLURM_SUBMIT_DIR:-$PWD}"
run srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" main.py train --distributed --hosts="$hosts" "$@" || status=$?
if ((status == 75)); then # preempted and saved
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
