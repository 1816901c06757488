"""scripts/kubernetes/jobset.yaml against the fields of JobSet v1alpha2 and of the Job and Pod inside it."""

import copy
from typing import Any

import pytest
import yaml

from switchjax.command import load_config
from switchjax.config import Config
from tests.jobs.sandbox import ROOT

# What may stand where, after the definitions of JobSet and of batch/v1 and core/v1; only what the manifest is likely to
# use. A set is a choice; `str` as a key is any name; a key with ! must be there.
CONTAINER = {
    "name!": str,
    "image!": str,
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": int, "name": str}],
    "resources": {"limits": {str: (str, int)}, "requests": {str: (str, int)}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
POD = {
    "restartPolicy!": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "serviceAccountName": str,
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
}
EXIT_CODES = {"containerName": str, "operator!": {"In", "NotIn"}, "values!": [int]}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules!": [{"action!": {"FailJob", "FailIndex", "Ignore", "Count"}, "onExitCodes": EXIT_CODES}]
    },
    "template!": {"metadata": dict, "spec!": POD},
}
RULE = {
    "name!": str,
    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"}],
    "targetReplicatedJobs": [str],
}
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "labels": {str: str}},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate"}, "rules": [RULE]},
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"metadata": dict, "spec!": JOB}}],
    },
}


def faults(value: Any, shape: Any, place: str = "") -> list[str]:
    """Where `value` is not of `shape`."""
    if isinstance(shape, set):
        return [] if value in shape else [f"{place}: {value} is none of {sorted(shape)}"]
    if isinstance(shape, list):
        items = enumerate(value) if isinstance(value, list) else []
        found = [] if isinstance(value, list) else [f"{place} is no list"]
        return found + [fault for i, item in items for fault in faults(item, shape[0], f"{place}[{i}]")]
    if isinstance(shape, dict):
        return mapping_faults(value, shape, place) if isinstance(value, dict) else [f"{place} is no mapping"]
    return (
        [] if type(value) in (shape if isinstance(shape, tuple) else (shape,)) else [f"{place}: {value} is no {shape}"]
    )


def mapping_faults(value: dict[str, Any], shape: dict[Any, Any], place: str) -> list[str]:
    required = {name.removesuffix("!") for name in shape if name is not str and name.endswith("!")}
    known = {name: shape.get(name, shape.get(f"{name}!", shape.get(str))) for name in value}
    found = [f"{place}.{name} is missing" for name in required - value.keys()]
    found += [f"{place}.{name} is unknown" for name, inner in known.items() if inner is None]
    inside = [(name, inner) for name, inner in known.items() if inner is not None]
    return found + [fault for name, inner in inside for fault in faults(value[name], inner, f"{place}.{name}")]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "scripts" / "kubernetes" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(manifest: dict[str, Any]) -> dict[str, Any]:
    (workers,) = manifest["spec"]["replicatedJobs"]
    return workers["template"]["spec"]


def test_every_field_is_one_of_jobset_and_of_its_type(manifest: dict[str, Any]) -> None:
    assert faults(manifest, JOBSET) == []


WORKERS = ("spec", "replicatedJobs", 0, "template", "spec")


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("kind",), "Job", ".kind: Job is none of"),
        (("spec", "failurePolicy", "maxRestart"), 3, ".spec.failurePolicy.maxRestart is unknown"),
        (("spec", "replicatedJobs"), {}, ".spec.replicatedJobs is no list"),
        ((*WORKERS, "completions"), "2", "completions: 2 is no <class 'int'>"),
        ((*WORKERS, "backoffLimit"), True, "backoffLimit: True is no <class 'int'>"),
        ((*WORKERS, "template", "spec"), {"containers": []}, "template.spec.restartPolicy is missing"),
        ((*WORKERS, "template", "spec", "containers", 0, "args", 0), 1, "args[0]: 1 is no <class 'str'>"),
    ],
)
def test_the_check_sees_a_fault(manifest: dict[str, Any], place: tuple[Any, ...], value: Any, fault: str) -> None:
    changed = copy.deepcopy(manifest)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (found,) = faults(changed, JOBSET)
    assert fault in found


def test_the_processes_find_each_other(manifest: dict[str, Any], job: dict[str, Any]) -> None:
    (container,) = job["template"]["spec"]["containers"]
    name, (workers,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    (port,) = container["ports"]
    # A pod's name is JOBSET-REPLICATEDJOB-JOB-POD, in the subdomain JOBSET.
    host = f"{name}-{workers['name']}-0-0.{name}"
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    wanted = [f"--coordinator={host}:{port['containerPort']}", f"--process_count={job['completions']}"]
    assert [*wanted, "--process_index=$(JOB_COMPLETION_INDEX)"] == container["args"][:3]


def test_one_pod_lost_starts_all_anew_but_bad_input_does_not(manifest: dict[str, Any], job: dict[str, Any]) -> None:
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 300
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (inner,), (outer,) = job["podFailurePolicy"]["rules"], manifest["spec"]["failurePolicy"]["rules"]
    assert (inner["action"], inner["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (outer["action"], outer["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_config_is_one_that_fits_the_gpus(job: dict[str, Any]) -> None:
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "scripts/train.py"]
    (name,) = [flag.removeprefix("--config=") for flag in container["args"] if flag.startswith("--config=")]
    config: Config = load_config(f"{ROOT}/{name}", [flag for flag in container["args"] if flag.startswith("--config.")])
    gpus = job["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus % (config.mesh.expert * config.mesh.model) == 0
    assert config.moe.num_experts % config.mesh.expert == 0
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
