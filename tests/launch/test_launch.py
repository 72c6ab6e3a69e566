"""Launch scripts: what they would run, shellcheck, that the manifest is a JobSet; and the SLURM script for real.

SLURM is replaced by two programs that start processes on this machine; Kubernetes and Google Cloud are not.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def run(script, *args, **environment):
  """Returns (status, stdout, stderr) of a launch script."""
  result = subprocess.run([ROOT / "launch" / script, *args], capture_output=True, text=True, cwd=ROOT,
                          env={"PATH": os.environ["PATH"], "HOME": "/nowhere"} | environment)  # fmt: skip
  return result.returncode, result.stdout, result.stderr


def commands(stderr):
  """Returns the printed commands as lists of arguments."""
  return [shlex.split(line[2:]) for line in stderr.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  shellcheck = shutil.which("shellcheck") or pathlib.Path(sys.executable).parent / "shellcheck"
  result = subprocess.run([shellcheck, script], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


def test_slurm_dry_run():
  arguments = ["--config=configs/digits.py:vit", "--config.model.overrides.image_size=(8, 8)"]
  status, _, stderr = run("slurm.sh", "--dry-run", *arguments, PYTHON="py")
  assert status == 0
  assert commands(stderr)[-1] == [
    "srun", "--kill-on-bad-exit=1", "py", "main.py", "train", "--distributed", "--hosts=NODE[0-1]", *arguments
  ]  # fmt: skip
  status, _, stderr = run("slurm.sh")
  assert (status, stderr.count("\n")) == (2, 1) and "sbatch" in stderr


def test_tpu_vm_dry_run():
  slice = dict(NAME="pod", ZONE="zone", TYPE="v5litepod-16", VERSION="image")
  gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]

  def dry(*args):
    status, _, stderr = run("tpu_vm.sh", "--dry-run", *args, **slice)
    assert status == 0
    return commands(stderr)

  assert dry("create", "--spot") == [
    [*gcloud, "create", "pod", "--zone=zone", "--accelerator-type=v5litepod-16", "--version=image", "--spot"]
  ]
  archive, copy, install = run("tpu_vm.sh", "--dry-run", "install", **slice)[2].split("\n+ ")
  assert archive.startswith("+ git archive") and "scp" in copy and "--worker=all" in copy
  assert '-e ".[train,tpu]"' in install
  train = run("tpu_vm.sh", "--dry-run", "train", "--config.x=(1, 2)", **slice)[2]
  assert r"main.py train --distributed --config.x=\\(1\\,\\ 2\\)" in train
  assert dry("delete") == [[*gcloud, "delete", "pod", "--zone=zone", "--quiet"]]
  status, _, stderr = run("tpu_vm.sh", "fly", **slice)
  assert status == 2 and "create, install, train, log, delete" in stderr


# The fields of JobSet, jobset.x-k8s.io/v1alpha2, that we use, and of the Job and Pod in it, from its published schema
# (config/components/crd/bases in kubernetes-sigs/jobset). A question mark is put behind those that may be left out.
STRINGS = {"": str}
POD = {
  "restartPolicy?": str, "terminationGracePeriodSeconds?": int, "nodeSelector?": STRINGS,
  "containers": [{
    "name": str, "image?": str, "command?": [str], "args?": [str], "ports?": [{"containerPort": int}],
    "resources?": {"limits?": {"": (int, str)}}, "volumeMounts?": [{"name": str, "mountPath": str}],
  }],
  "volumes?": [{"name": str, "csi?": {"driver": str, "volumeAttributes?": STRINGS}}],
}  # fmt: skip
JOB = {
  "completionMode?": str, "completions?": int, "parallelism?": int, "backoffLimit?": int,
  "podFailurePolicy?": {"rules": [{
    "action": str, "onExitCodes?": {"containerName?": str, "operator": str, "values": [int]},
    "onPodConditions?": [{"type": str, "status?": str}],
  }]},
  "template": {"metadata?": {"annotations?": STRINGS}, "spec?": POD},
}  # fmt: skip
JOBSET = {
  "apiVersion": str, "kind": str, "metadata": {"name": str},
  "spec": {
    "failurePolicy?": {
      "maxRestarts?": int, "rules?": [{"name": str, "action": str, "onJobFailureReasons?": [str]}],
    },
    "replicatedJobs": [{"name": str, "replicas?": int, "template": {"spec": JOB}}],
  },
}  # fmt: skip


def check(value, schema, path="jobset"):
  if isinstance(schema, dict) and "" in schema:
    assert all(isinstance(v, schema[""]) for v in value.values()), path
  elif isinstance(schema, dict):
    required = {key for key in schema if not key.endswith("?")}
    assert required <= value.keys() <= required | {key.removesuffix("?") for key in schema}, path
    for key, inner in value.items():
      check(inner, schema.get(key, schema.get(f"{key}?")), f"{path}.{key}")
  elif isinstance(schema, list):
    for i, inner in enumerate(value):
      check(inner, schema[0], f"{path}.{i}")
  else:
    assert isinstance(value, schema), path


def test_jobset():
  arguments = ["--config.model.overrides.image_size=(8, 8)", "it's NAME", "--workdir=/bucket/run"]
  status, manifest, _ = run("gke.sh", "--dry-run", *arguments, IMAGE="image", BUCKET="b", NAME="run", HOSTS="3")
  assert status == 0
  jobset = yaml.safe_load(manifest)
  check(jobset, JOBSET)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["completions"] == job["parallelism"] == 3
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
  (container,) = job["template"]["spec"]["containers"]
  assert container["args"][2:] == arguments

  # What bash makes of it in the second pod.
  script = ["bash", "-c", container["args"][0].replace("exec python", "printf '%s\\n'"), *container["args"][1:]]
  printed = subprocess.run(script, env={"JOB_COMPLETION_INDEX": "1"}, capture_output=True, text=True, check=True).stdout
  assert printed.splitlines() == [
    "main.py", "train", "--coordinator=run-slice-0-0.run:8476", "--num-processes=3", "--process-id=1",
    "--hosts=run-slice-0-0,run-slice-0-1,run-slice-0-2", "--wait=900", *arguments,
  ]  # fmt: skip
  status, _, stderr = run("gke.sh", "--dry-run")
  assert status != 0 and "IMAGE" in stderr


@pytest.fixture
def slurm(tmp_path):
  """A folder with programs that do on this machine what SLURM does on two nodes; they write what they were asked."""
  folder = tmp_path / "bin"
  folder.mkdir()
  (folder / "srun").write_text("""#!/usr/bin/env bash
shift  # --kill-on-bad-exit
echo "srun $*" >>"$CALLS"
export SLURM_STEP_NODELIST=localhost,elsewhere SLURM_NTASKS=2 SLURM_LOCALID=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  "$@" &
done
wait -n || exit
wait -n
""")
  (folder / "scontrol").write_text("""#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
printf 'localhost\\nelsewhere\\n'
""")
  for program in folder.iterdir():
    program.chmod(0o755)
  return dict(PATH=f"{folder}:{os.environ['PATH']}", CALLS=str(tmp_path / "calls"), SLURM_JOB_ID=str(os.getpid()),
              SLURM_JOB_NODELIST="localhost,elsewhere", SLURM_SUBMIT_DIR=str(ROOT))  # fmt: skip


def test_slurm_job_that_was_preempted_queues_again(slurm, tmp_path):
  for status in (0, 1, 75):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {status}\n")
    python.chmod(0o755)
    (tmp_path / "calls").unlink(missing_ok=True)
    assert run("slurm.sh", "--workdir=/w", PYTHON=str(python), **slurm)[0] == status
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1] == f"srun {python} main.py train --distributed --hosts=localhost,elsewhere --workdir=/w"
    assert calls[2:] == ([f"scontrol requeue {os.getpid()}"] if status == 75 else [])


@pytest.mark.slow
def test_slurm_job_trains(slurm, tmp_path, data_dir):
  status, _, stderr = run(
    "slurm.sh", f"--workdir={tmp_path / 'run'}", f"--config.dataset.data_dir={data_dir}", "--config.total_steps=2",
    "--config.optimizer.warmup_steps=1", "--config.eval_every_steps=2", "--config.log_every_steps=1",
    "--config.model.overrides.depth=((1,1),)", PYTHON=sys.executable, **slurm,
  )  # fmt: skip
  assert status == 0, stderr
  assert "2 processes, 2 devices of which 1 here" in stderr
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 2]
