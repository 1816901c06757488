"""scripts/tpu/job.sh, with a cloud that answers from files and workers that are folders."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.jobs.sandbox import ROOT, Sandbox, write_job

TRAIN = "(--config=configs/switch.py:base-8 '--config.data.directory=it'\\''s a $folder')"
SETTINGS = {
    "NAME": "my-run",
    "PROJECT": "p",
    "ZONE": "z",
    "ACCELERATOR": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "BUCKET": "my-bucket",
    "TRAIN": TRAIN,
}
FLAGS = ["--config=configs/switch.py:base-8", "--config.data.directory=it's a $folder"]
PLACE = ["--project=p", "--zone=z"]
TPUS = ["gcloud", "compute", "tpus"]
COMMANDS = ["create", "setup", "launch", "logs", "stop", "delete"]

# Each line of `states` and `activities` is one answer.
CLOUD = """
next() { head -n 1 "$1"; sed -i 1d "$1"; }
cd "$CLOUD"
case "$*" in
  "storage ls "*) test -e complete ;;
  *queued-resources\\ list*) next states ;;
  *is-active*) next activities ;;
  *) test ! -e "broken" ;;
esac
test $? -eq 0 || exit 1
test -s states || touch complete
"""


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    made.add("gcloud", CLOUD)
    made.add("sleep")
    write_job(tmp_path / "my.job", SETTINGS)
    return made


def job(sandbox: Sandbox, arguments: str) -> "subprocess.CompletedProcess[str]":
    return sandbox.run(f"repository/scripts/tpu/job.sh {arguments}", cwd=sandbox.root.parent, CLOUD=str(cloud(sandbox)))


def cloud(sandbox: Sandbox, states: str = "", activities: str = "") -> Path:
    folder = sandbox.root.parent
    for name, lines in {"states": states, "activities": activities}.items():
        if lines or not (folder / name).exists():
            (folder / name).write_text("".join(f"{line}\n" for line in lines.split(",")))
    return folder


def dry_run(sandbox: Sandbox, command: str) -> list[list[str]]:
    """The commands that a dry run prints, as a shell would read them."""
    done = job(sandbox, f"{command} my.job --dry-run")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    words = shlex.shlex(done.stdout, posix=True, punctuation_chars="\n")
    words.whitespace, words.whitespace_split = " \t", True
    commands: list[list[str]] = [[]]
    for word in words:
        if word.strip("\n"):
            commands[-1].append(word)
        else:
            commands.append([])
    return [command for command in commands if command]


@pytest.mark.parametrize("arguments", ["--help", "create --help", "-h watch my.job"])
def test_help_names_every_command(sandbox: Sandbox, arguments: str) -> None:
    done = job(sandbox, arguments)
    assert done.returncode == 0
    assert all(f"\n  {command} " in done.stdout for command in [*COMMANDS, "watch"])
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_prints_what_a_run_does_word_for_word_and_does_nothing(sandbox: Sandbox, command: str) -> None:
    sandbox.add("git", 'test "$1" != rev-parse || echo 0123abcd')
    sandbox.add("mkdir")
    printed = dry_run(sandbox, command)
    changing = {"gcloud", "mkdir"}
    assert not [call for call in sandbox.calls() if call[0] in changing or call[1] == "archive"]
    done = job(sandbox, f"{command} my.job")
    assert done.returncode == 0, done.stderr
    ran = [call for call in sandbox.calls() if call[0] in changing or call[1] == "archive"]
    assert ran == printed


def test_a_watch_prints_every_command_of_the_jobs_life(sandbox: Sandbox) -> None:
    printed = dry_run(sandbox, "watch")
    commit = sandbox.run("git rev-parse HEAD").stdout.strip()
    once = [call for command in COMMANDS if command != "stop" for call in dry_run(sandbox, command)]
    assert all(call in printed for call in once)
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert [*TPUS, "queued-resources", "create", "my-run", "--node-id=my-run", *kind, *PLACE] in printed
    assert [*TPUS, "queued-resources", "delete", "my-run", "--force", "--quiet", *PLACE] in printed
    assert [*TPUS, "tpu-vm", "scp", "build/my-run.tar.gz", "my-run:", "--worker=all", *PLACE] in printed
    assert ["git", "archive", "--format=tar.gz", "--output=build/my-run.tar.gz", commit] in printed
    assert ["gcloud", "storage", "ls", "gs://my-bucket/my-run/summary.json", "--project=p"] in printed
    assert ["gcloud", "storage", "cp", "gs://my-bucket/my-run/logs", "runs/my-run", "--recursive", "--project=p"] in (
        printed
    )


def test_machines_that_stay(sandbox: Sandbox) -> None:
    write_job(sandbox.root.parent / "my.job", SETTINGS | {"SPOT": "no"})
    assert "--spot" not in dry_run(sandbox, "create")[0]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ("create", {}, "takes a command and a job"),
        ("", {}, "takes a command and a job"),
        ("make my.job", {}, "unknown command make"),
        ("create other.job", {}, "cannot read the job "),
        *(("create my.job", {name: "''"}, f"my.job does not set {name}") for name in SETTINGS),
        ("watch my.job --dry-run", {"ZONE": "''"}, "my.job does not set ZONE"),
        ("create my.job", {"NAME": "My_Run"}, "NAME=My_Run: use lower-case letters"),
        ("create my.job", {"BUCKET": "gs://my-bucket"}, "without gs://"),
        ("create my.job", {"SPOT": "maybe"}, "SPOT=maybe: must be yes or no"),
        ("create my.job", {"POLL": "0"}, "POLL=0: must be a positive number"),
        ("create my.job", {"ATTEMPTS": "x"}, "ATTEMPTS=x: must be a positive number"),
        ("setup my.job", {"COMMIT": "nowhere"}, "COMMIT=nowhere: not a commit"),
        ("create my.job", {"TRAIN": "(--workdir=here)"}, "TRAIN must not set --workdir"),
        ("create my.job", {"TRAIN": "(--config=x"}, "my.job is not valid bash"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(sandbox: Sandbox, arguments: str, settings: dict[str, str], message: str) -> None:
    write_job(sandbox.root.parent / "my.job", SETTINGS | settings)
    done = job(sandbox, arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not [call for call in sandbox.calls() if call[0] == "gcloud"]


def test_settings_of_the_environment_are_not_the_jobs(sandbox: Sandbox) -> None:
    write_job(sandbox.root.parent / "my.job", {name: SETTINGS[name] for name in SETTINGS if name != "ZONE"})
    done = sandbox.run("ZONE=elsewhere scripts/tpu/job.sh create ../my.job --dry-run")
    assert done.stderr.endswith("my.job does not set ZONE\n")


def watched(sandbox: Sandbox, states: str, activities: str, **settings: str) -> tuple[list[str], int]:
    """What a watch does, in words, when the cloud answers this."""
    write_job(sandbox.root.parent / "my.job", SETTINGS | settings)
    cloud(sandbox, states, activities)
    done = job(sandbox, "watch my.job")
    words = {
        "create": "create",
        "delete": "delete",
        "scp": "setup",
        "systemd-run --quiet --collect --unit=my-run": "launch",
    }
    words |= {"cp": "logs"}
    did = [
        word
        for call in sandbox.calls()
        if call[0] == "gcloud"
        for sign, word in words.items()
        if sign in call or (" " in sign and sign in call[-3])
    ]
    return did, done.returncode


def test_a_watch_creates_launches_survives_preemptions_and_cleans_up(sandbox: Sandbox) -> None:
    states = ",WAITING_FOR_RESOURCES,PROVISIONING,ACTIVE,ACTIVE,SUSPENDING,SUSPENDED,,ACTIVE,ACTIVE"
    did, code = watched(sandbox, states, "inactive,active,inactive,active", ATTEMPTS="1")
    started = ["create", "setup", "launch"]
    assert did == [*started, "delete", *started, "logs", "delete"]
    assert code == 0


def test_a_run_that_stops_by_itself_is_launched_so_often_and_the_slice_is_left(sandbox: Sandbox) -> None:
    did, code = watched(sandbox, "ACTIVE,ACTIVE,ACTIVE,ACTIVE", "inactive,failed,failed,active", ATTEMPTS="2")
    assert did == ["setup", "launch", "setup", "launch", "logs"]
    assert code == 2


def test_a_failed_request_ends_the_watch(sandbox: Sandbox) -> None:
    assert watched(sandbox, "FAILED,ACTIVE", "") == ([], 2)


def test_workers_that_cannot_be_asked_are_left_alone(sandbox: Sandbox) -> None:
    assert watched(sandbox, "ACTIVE,ACTIVE", ",active") == (["logs", "delete"], 0)


class Worker:
    """A worker's home, and what its commands call."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.home = sandbox, sandbox.root.parent / "home"
        self.home.mkdir()
        sandbox.add("sudo", 'exec "$@"')
        sandbox.add("systemctl")
        sandbox.add("systemd-run", f'touch "{self.home}/mounted"')
        sandbox.add("mountpoint", f'test -e "{self.home}/mounted"')
        sandbox.add("gcsfuse")

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Does on the worker what `command` of a job sends there."""
        done = job(self.sandbox, f"{command} my.job")
        assert done.returncode == 0, done.stderr
        calls = [call for call in self.sandbox.calls() if call[0] == "gcloud"]
        for call in calls:
            if "scp" in call:
                shutil.copy(self.sandbox.root / call[5], self.home)
        sent = next(word for call in calls for word in call if word.startswith("--command="))
        return self.sandbox.run(sent.removeprefix("--command="), cwd=self.home, home=self.home)


@pytest.fixture
def worker(sandbox: Sandbox) -> Worker:
    return Worker(sandbox)


@pytest.mark.parametrize("python_is_new", [True, False])
def test_setup_brings_the_commit_the_bucket_and_the_environment(worker: Worker, python_is_new: bool) -> None:
    sandbox = worker.sandbox
    sandbox.add("python3", 'test "$1" != -c' if not python_is_new else "")
    sandbox.add("uv")
    (sandbox.root / "scripts" / "environment.sh").write_text("uncommitted")
    sandbox.run("git checkout --quiet scripts/environment.sh")
    (sandbox.root / "scripts" / "use_environment.sh").write_text('use_environment() { touch ".venv-$1"; }')
    sandbox.run("git -c user.name=a -c user.email=a commit --quiet --all --message=b")
    (sandbox.root / "scripts" / "quickstart.sh").write_text("uncommitted")
    (worker.home / "my-run" / "scripts").mkdir(parents=True)
    (worker.home / "my-run" / "scripts" / "old.py").touch()
    (worker.home / "my-run" / ".venv").mkdir()
    done = worker.run("setup")
    assert done.returncode == 0, done.stderr
    code = worker.home / "my-run"
    assert (code / "scripts" / "quickstart.sh").read_text() == (ROOT / "scripts" / "quickstart.sh").read_text()
    assert (code / ".venv-tpu").exists()
    assert (code / ".venv").exists()
    assert not (code / "scripts" / "old.py").exists()
    calls = sandbox.calls()
    mount = next(call for call in calls if call[0] == "systemd-run")
    assert mount[-4:] == ["--foreground", "--metadata-cache-ttl-secs=0", "my-bucket", f"{worker.home}/bucket"]
    python = ["uv", "python", "install", "--quiet", "3.12"]
    assert [call for call in calls if call[0] == "uv"] == ([] if python_is_new else [python])


def test_setup_without_gcsfuse_says_so(worker: Worker) -> None:
    (worker.sandbox.root.parent / "bin" / "gcsfuse").unlink()
    done = worker.run("setup")
    assert done.returncode == 2
    assert re.fullmatch(r"error: no gcsfuse on \S+: set PREPARE to install it\n", done.stderr)


def test_prepare_runs_first(worker: Worker) -> None:
    (worker.sandbox.root.parent / "bin" / "gcsfuse").unlink()
    write_job(worker.sandbox.root.parent / "my.job", SETTINGS | {"PREPARE": "'echo it is; exit 7'"})
    done = worker.run("setup")
    assert (done.stdout, done.returncode) == ("it is\n", 7)


def test_launch_starts_the_training_as_it_was_written(worker: Worker) -> None:
    (worker.home / "my-run").mkdir()
    done = worker.run("launch")
    assert done.returncode == 0, done.stderr
    calls = [call for call in worker.sandbox.calls() if call[0] != "sudo"]
    assert calls[0] == ["systemctl", "stop", "my-run"]
    assert calls[1][0] == "systemd-run"
    python = calls[1].index(f"{worker.home}/my-run/.venv/bin/python")
    assert calls[1][python + 1 :] == ["scripts/train.py", f"--workdir={worker.home}/bucket/my-run", *FLAGS]
    # At a preemption the run is stopped, and saves, before the bucket goes.
    assert "--property=After=bucket.service" in calls[1]
    assert "--property=KillMode=mixed" in calls[1]


def test_logs_are_one_file_a_worker(worker: Worker) -> None:
    (worker.home / "my-run.log").write_text("step 1\n")
    done = worker.run("logs")
    assert done.returncode == 0, done.stderr
    (log,) = (worker.home / "bucket" / "my-run" / "logs").iterdir()
    assert log.read_text() == "step 1\n"


def test_the_example_is_a_job(sandbox: Sandbox) -> None:
    done = sandbox.run("scripts/tpu/job.sh create scripts/tpu/example.job --dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus queued-resources create switch-base-128 ")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no Google Cloud CLI to ask")
def test_gcloud_knows_every_command_and_flag(sandbox: Sandbox, tmp_path: Path) -> None:
    commands = {shlex.join(call) for call in dry_run(sandbox, "watch") if call[0] == "gcloud"}
    wrong = shlex.join([*TPUS, "tpu-vm", "ssh", "my-run", "--workers=all"])
    entries = [{"command_string": command} for command in [*commands, wrong]]
    (tmp_path / "commands.json").write_text(json.dumps(entries))
    # Its own check of a command's words; it reads nobody's settings and asks no cloud.
    apart = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"],
        env=os.environ | apart | {"CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"},
        capture_output=True,
        text=True,
    )
    if not done.stdout:
        pytest.skip(f"this gcloud does not check commands: {done.stderr.splitlines()[:1]}")
    answers = json.loads(done.stdout)
    assert len(answers) == len(entries)
    assert [answer["command_string"] for answer in answers if not answer["success"]] == [wrong]
