"""Stands in for gcloud, kubectl, sbatch, srun, scontrol, python and uv, by the name that it is called under.

In the folder $STANDIN: `calls.jsonl` gets a line for each call (program, argv, environment of interest); `plan.json`
says what goes wrong; `vm` and `jobset` exist while the cloud's machine and the cluster's job do. The standard
library only, and little of it: it is started hundreds of times.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(os.environ["STANDIN"])
PLAN = json.loads((HERE / "plan.json").read_text())
PROGRAM, ARGV = Path(sys.argv[0]).name, sys.argv[1:]
ENVIRONMENT = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "EXTRA", "SLURM_PROCID")


def turn(name):
    """Returns how often something has been asked for, this time included."""
    file = HERE / f"turn-{name}"
    count = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(count))
    return count


def planned(name, default):
    """Returns the next of the planned answers, the last one again when they are used up."""
    answers = PLAN.get(name, [default])
    return answers[min(turn(name), len(answers)) - 1]


def option(name):
    return next((word.partition("=")[2] for word in ARGV if word.startswith(f"--{name}=")), None)


def main_of_jaxtl():
    """What `python -m jaxtl.main` does, in the folder that it is called in."""
    print(f"training on {ARGV}")
    status = planned("main", 0)
    if status == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (HERE / f"hangs-{os.getpid()}").touch()
        time.sleep(60)
    return status


def python():
    if ARGV[:2] == ["-m", "jaxtl.main"]:
        return main_of_jaxtl()
    if ARGV[:3] == ["-m", "pip", "wheel"]:
        (Path(option("wheel-dir")) / "jaxtl-0.1.0-py3-none-any.whl").write_text("wheel")
        return planned("wheel", 0)
    if ARGV[:2] == ["-m", "pip"]:
        return 0
    os.execv(sys.executable, [sys.executable, "-I", "-S", *ARGV])


def uv():
    if ARGV[0] == "venv":
        folder = Path(ARGV[-1]) / "bin"
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(HERE / "bin" / "python3")
    else:
        assert any(Path(word).is_file() for word in ARGV if word.endswith(".whl")) or "git+https" in " ".join(ARGV)
    return 0


def gcloud():
    vm, what = HERE / "vm", ARGV[2:4]
    if what == ["queued-resources", "list"]:
        assert option("filter") == f'name ~ "/queuedResources/{PLAN["name"]}$"'
        if vm.exists() and vm.read_text() == "requested":
            state = planned("states", "ACTIVE")
            vm.write_text(state if state in ("ACTIVE", "FAILED") else "requested")
            print(state)
        elif vm.exists():
            print(vm.read_text())
        return 0
    if what == ["queued-resources", "create"]:
        assert not vm.exists(), "there is one already"
        vm.write_text("requested")
        return planned("created", 0)  # may have come into being all the same
    if what == ["queued-resources", "delete"]:
        assert "--force" in ARGV
        if not vm.exists():
            print("NOT_FOUND", file=sys.stderr)
            return 1
        vm.unlink()
        shutil.rmtree(HERE / "worker")
        return 0
    assert vm.read_text() == "ACTIVE", "the VM is not there"
    if what == ["tpu-vm", "describe"]:
        print("READY")
        return 0
    worker = HERE / "worker"
    worker.mkdir(exist_ok=True)
    assert option("worker") == "all"
    if what == ["tpu-vm", "scp"]:
        source, target = ARGV[5:7]
        assert target == f"{PLAN['name']}:"
        shutil.copytree(source, worker / Path(source).name, dirs_exist_ok=True)
        return 0
    assert what == ["tpu-vm", "ssh"]
    runs = "jaxtl.main" in option("command")
    # What sshd does: the user's shell gets the words, joined by spaces, as one string.
    status = subprocess.run(["bash", "-c", option("command")], cwd=worker, env={**os.environ, "HOME": str(worker)})
    if runs and planned("preempted", False):
        vm.write_text("SUSPENDED")
        return 255
    return status.returncode


def kubectl():
    jobset, verb = HERE / "jobset", [word for word in ARGV if not word.startswith("--")]
    if verb[:2] == ["get", "jobset"] and "--output=name" in ARGV:
        if jobset.exists():
            print(f"jobset.jobset.x-k8s.io/{verb[2]}")
    elif verb[0] == "apply":
        jobset.write_bytes(Path(option("filename")).read_bytes())
        shutil.copy(jobset, HERE / "manifest.yaml")
    elif verb[:2] == ["get", "jobset"]:
        print(planned("terminal", "Completed"), end="")
    elif verb[:2] == ["get", "pods"]:
        print(planned("pods", "digits-workers-0-0-abc Running\n"), end="")
    elif verb[0] == "logs":
        print(f"output of {verb[1]}")
        if PLAN.get("logs") == "hang":
            time.sleep(60)
    elif verb[0] == "delete":
        jobset.unlink(missing_ok=True)
    return 0


def sbatch():
    """Runs the job at once, as SLURM does: a copy of the script."""
    at = next(index for index, word in enumerate(ARGV) if not word.startswith("--"))
    copy = HERE / "slurm_script"
    shutil.copy(ARGV[at], copy)
    print("Submitted batch job 7")
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(PLAN.get("restarted", 0))}
    with (HERE / "job.log").open("w") as log:
        job = subprocess.Popen(["bash", copy, *ARGV[at + 1 :]], env=env, stdout=log, stderr=log)
        if told := PLAN.get("signal_job"):
            deadline = time.time() + 20
            while not list(HERE.glob("hangs-*")) and time.time() < deadline:
                time.sleep(0.02)
            job.send_signal(getattr(signal, told))
        (HERE / "job-status").write_text(str(job.wait()))
    return 0


def srun():
    """Starts the tasks, and passes SIGTERM on to them."""
    number = int(option("nodes")) * int(option("ntasks-per-node"))
    at = next(index for index, word in enumerate(ARGV) if not word.startswith("--"))
    tasks = [subprocess.Popen(ARGV[at:], env={**os.environ, "SLURM_PROCID": str(index)}) for index in range(number)]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    return max(task.wait() for task in tasks)


def record():
    """Returns the number of this call among those of the program."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    line = json.dumps({"program": PROGRAM, "argv": ARGV, "environment": environment, "cwd": os.getcwd()})
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(line + "\n")
    return turn(PROGRAM)


def run():
    call = record()
    does = {
        **{"python": python, "python3": python, "uv": uv, "gcloud": gcloud, "kubectl": kubectl},
        **{"sbatch": sbatch, "srun": srun, "scontrol": lambda: 0},
    }[PROGRAM]
    if call == PLAN.get("signal_at", {}).get(PROGRAM):
        if "create" in ARGV or "apply" in ARGV:  # the worst moment: it has been made, and nobody was told
            does()
        os.kill(int((HERE / "launcher").read_text()), getattr(signal, PLAN["signal"]))
        time.sleep(30)
    if call in PLAN.get("fail_at", {}).get(PROGRAM, []) or any(
        all(word in ARGV for word in words) for words in PLAN.get("fail_always", [])
    ):
        print("planned failure", file=sys.stderr)
        return PLAN.get("failure", 1)
    return does()


sys.exit(run())
