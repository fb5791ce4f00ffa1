"""Stands in for gcloud, kubectl, sbatch, srun, scontrol, python and uv, by the name that it is called under.

In the folder $STANDIN: `calls.jsonl` gets a line for each call (program, argv, environment of interest); `plan.json`
says what goes wrong; `vm` and `jobset` exist while the cloud's machine and the cluster's job do. The standard
library only, and little of it: it is started hundreds of times.
"""

import json
import os
import sys

HERE = os.environ["STANDIN"]
PROGRAM, ARGV = os.path.basename(sys.argv[0]), sys.argv[1:]
ENVIRONMENT = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "EXTRA", "SLURM_PROCID")


def there(name):
    return os.path.exists(f"{HERE}/{name}")


def read(name):
    with open(f"{HERE}/{name}", encoding="utf-8") as file:
        return file.read()


def write(name, text="", mode="w"):
    with open(f"{HERE}/{name}", mode, encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def turn(name):
    """Returns how often something has been asked for, this time included; several may ask at once."""
    with open(f"{HERE}/turn-{name}", "ab", buffering=0) as file:
        file.write(b".")
        return file.tell()  # behind one's own, whoever else has written meanwhile


PLAN = json.loads(read("plan.json"))


def planned(name, default):
    """Returns the next of the planned answers, the last one again when they are used up."""
    answers = PLAN.get(name, [default])
    return answers[min(turn(name), len(answers)) - 1]


def option(name):
    return next((word.partition("=")[2] for word in ARGV if word.startswith(f"--{name}=")), None)


def first_word():
    """Returns where the first argument is that is no flag."""
    return next(index for index, word in enumerate(ARGV) if not word.startswith("--"))


def wait(seconds):
    import time

    time.sleep(seconds)


def main_of_jaxtl():
    """What `python -m jaxtl.main` does, in the folder that it is called in."""
    print(f"training on {ARGV}", flush=True)
    status = planned("main", 0)
    if status == "hang":
        import signal

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        write(f"hangs-{os.getpid()}")
        wait(60)
    return status


def python():
    if ARGV[:2] == ["-m", "jaxtl.main"]:
        return main_of_jaxtl()
    if ARGV[:3] == ["-m", "pip", "wheel"]:
        with open(f"{option('wheel-dir')}/jaxtl-0.1.0-py3-none-any.whl", "w") as file:
            file.write("wheel")
        return planned("wheel", 0)
    os.execv(sys.executable, [sys.executable, "-IS", *ARGV])


def uv():
    if ARGV[0] == "venv":
        os.makedirs(f"{ARGV[-1]}/bin")
        os.symlink(f"{HERE}/bin/python", f"{ARGV[-1]}/bin/python")
    else:
        assert any(os.path.isfile(word) or word.startswith("git+https") for word in ARGV)
    return 0


def gcloud():
    what = ARGV[2:4]
    if what == ["queued-resources", "list"]:
        assert option("filter") == f'name ~ "/queuedResources/{PLAN["name"]}$"'
        if there("vm") and read("vm") == "requested":
            state = planned("states", "ACTIVE")
            write("vm", state if state in ("ACTIVE", "FAILED") else "requested")
            print(state)
        elif there("vm"):
            print(read("vm"))
        return 0
    if what == ["queued-resources", "create"]:
        assert not there("vm"), "there is one already"
        write("vm", "requested")
        return planned("created", 0)  # not 0: it came into being all the same
    if what == ["queued-resources", "delete"]:
        import shutil

        assert "--force" in ARGV
        if not there("vm"):
            print("NOT_FOUND", file=sys.stderr)
            return 1
        os.unlink(f"{HERE}/vm")
        shutil.rmtree(f"{HERE}/worker", ignore_errors=True)
        return 0
    if not there("vm") or read("vm") != "ACTIVE":
        print("the VM is not there", file=sys.stderr)
        return 255
    if what == ["tpu-vm", "describe"]:
        print("READY")
        return 0
    worker = f"{HERE}/worker"
    os.makedirs(worker, exist_ok=True)
    assert option("worker") == "all"
    if what == ["tpu-vm", "scp"]:
        import shutil

        source, target = ARGV[5:7]
        assert target == f"{PLAN['name']}:"
        shutil.copytree(source, f"{worker}/{os.path.basename(source)}", dirs_exist_ok=True)
        return 0
    assert what == ["tpu-vm", "ssh"]
    # What sshd does: the user's shell gets the words, joined by spaces, as one string.
    os.environ["HOME"] = worker
    os.chdir(worker)
    status = os.spawnlp(os.P_WAIT, "bash", "bash", "-c", option("command"))
    if "jaxtl.main" in option("command") and planned("preempted", False):
        write("vm", "SUSPENDED")
        return 255
    return status


def kubectl():
    verb = [word for word in ARGV if not word.startswith("--")]
    if verb[:2] == ["get", "jobset"] and "--output=name" in ARGV:
        if there("jobset"):
            print(f"jobset.jobset.x-k8s.io/{verb[2]}")
    elif verb[0] == "apply":
        with open(option("filename"), encoding="utf-8") as file:
            text = file.read()
        write("jobset", text)
        write("manifest.yaml", text)
    elif verb[:2] == ["get", "jobset"]:
        print(planned("terminal", "Completed"), end="")
    elif verb[:2] == ["get", "pods"]:
        print(planned("pods", "digits-workers-0-0-abc Running\n"), end="")
    elif verb[0] == "logs":
        print(f"output of {verb[1]}")
    elif verb[0] == "delete" and there("jobset"):
        os.unlink(f"{HERE}/jobset")
    return 0


def sbatch():
    """Runs the job at once, as SLURM does: a copy of the script."""
    import shutil
    import signal
    import subprocess

    at, copy = first_word(), f"{HERE}/slurm_script"
    shutil.copy(ARGV[at], copy)
    print("Submitted batch job 7")
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(PLAN.get("restarted", 0))}
    with open(f"{HERE}/job.log", "w") as log:
        job = subprocess.Popen(["bash", copy, *ARGV[at + 1 :]], env=env, stdout=log, stderr=log)
        if told := PLAN.get("signal_job"):
            for _ in range(1000):
                if any(name.startswith("hangs-") for name in os.listdir(HERE)):
                    break
                wait(0.02)
            job.send_signal(getattr(signal, told))
        write("job-status", str(job.wait()))
    return 0


def srun():
    """Starts the tasks, and passes SIGTERM on to them."""
    import signal
    import subprocess

    number, at = int(option("nodes")) * int(option("ntasks-per-node")), first_word()
    tasks = [subprocess.Popen(ARGV[at:], env={**os.environ, "SLURM_PROCID": str(index)}) for index in range(number)]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    return max(task.wait() for task in tasks)


def main():
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    call = {"program": PROGRAM, "argv": ARGV, "environment": environment, "cwd": os.getcwd()}
    write("calls.jsonl", json.dumps(call) + "\n", "a")
    number = turn(PROGRAM)
    does = {
        **{"python": python, "python3": python, "uv": uv, "gcloud": gcloud, "kubectl": kubectl},
        **{"sbatch": sbatch, "srun": srun, "scontrol": lambda: 0},
    }[PROGRAM]
    if number == PLAN.get("signal_at", {}).get(PROGRAM):
        import signal

        if "create" in ARGV or "apply" in ARGV:  # the worst moment: it has been made, and nobody was told
            does()
        os.kill(int(read("launcher")), getattr(signal, PLAN["signal"]))
        wait(30)
    if number in PLAN.get("fail_at", {}).get(PROGRAM, []) or any(
        all(word in ARGV for word in words) for words in PLAN.get("fail_always", [])
    ):
        print("planned failure", file=sys.stderr)
        return PLAN.get("failure", 1)
    return does()
