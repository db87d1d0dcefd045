"""The shipped examples for schedulers: each parses, fits its schema, names commands that exist, and
exposes nothing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import typer
import yaml

from glm_batch.jobs.__main__ import app
from glm_batch.jobs.cron.cron import seconds_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "jobs" / "deploy"
TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(m|[KMGT]i?)?$"}


def section(required: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object",
        "properties": keys,
        "required": list(required),
        "additionalProperties": False,
    }


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


# What the examples use of the schemas of Kubernetes 1.31 and KubeRay 1.5.1; a key that is spelled
# wrongly is unknown.
METADATA = section(name=TEXT, generateName=TEXT)
SECRET = section(("secretKeyRef",), secretKeyRef=section(("name", "key"), name=TEXT, key=TEXT))
CONTAINER = section(
    ("name", "image"),
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    workingDir=TEXT,
    env=listed(section(("name",), name=TEXT, value=TEXT, valueFrom=SECRET)),
    resources={
        "type": "object",
        "properties": {
            name: {"type": "object", "additionalProperties": QUANTITY}
            for name in ("requests", "limits")
        },
        "additionalProperties": False,
    },
    securityContext=section(
        allowPrivilegeEscalation={"type": "boolean"}, capabilities=section(drop=listed(TEXT))
    ),
    volumeMounts=listed(
        section(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly={"type": "boolean"})
    ),
)
VOLUME = section(
    ("name",),
    name=TEXT,
    configMap=section(("name",), name=TEXT),
    persistentVolumeClaim=section(("claimName",), claimName=TEXT, readOnly={"type": "boolean"}),
    emptyDir=section(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
)
POD = section(
    ("containers",),
    containers=listed(CONTAINER),
    volumes=listed(VOLUME),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    automountServiceAccountToken={"type": "boolean"},
    terminationGracePeriodSeconds=COUNT,
    securityContext=section(
        runAsNonRoot={"type": "boolean"},
        runAsUser=COUNT,
        fsGroup=COUNT,
        seccompProfile=section(type=TEXT),
    ),
)
TEMPLATE = section(("spec",), spec=POD)
EXIT_CODES = section(
    ("operator", "values"),
    containerName=TEXT,
    operator={"enum": ["In", "NotIn"]},
    values=listed(COUNT),
)
CRON_JOB = section(
    ("schedule", "jobTemplate"),
    schedule=TEXT,
    timeZone=TEXT,
    concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
    startingDeadlineSeconds=COUNT,
    successfulJobsHistoryLimit=COUNT,
    failedJobsHistoryLimit=COUNT,
    jobTemplate=section(
        ("spec",),
        spec=section(
            ("template",),
            backoffLimit=COUNT,
            podFailurePolicy=section(
                rules=listed(
                    section(("action",), action={"enum": ["FailJob"]}, onExitCodes=EXIT_CODES)
                )
            ),
            template=TEMPLATE,
        ),
    ),
)
PARAMS = {"type": "object", "additionalProperties": TEXT}
RAY_CLUSTER = section(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=section(mode={"enum": ["token", "disabled"]}, secretName=TEXT),
    headGroupSpec=section(
        ("template",), serviceType={"enum": ["ClusterIP"]}, rayStartParams=PARAMS, template=TEMPLATE
    ),
    workerGroupSpecs=listed(
        section(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=PARAMS,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = section(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)
RAY_SERVICE = section(
    ("serveConfigV2", "rayClusterConfig"), serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER
)
KINDS = {
    "cronjob.yaml": ("batch/v1", "CronJob", CRON_JOB),
    "rayjob.yaml": ("ray.io/v1", "RayJob", RAY_JOB),
    "rayservice.yaml": ("ray.io/v1", "RayService", RAY_SERVICE),
}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return content


def every(value: Any, key: str) -> Iterator[Any]:
    """Each value that stands under a key, at any depth."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for inner in value.values():
            yield from every(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, key)


def check_command(words: list[str]) -> None:
    """`glm-batch cron JOB ...` with options that exist and values that are taken."""
    assert Path(words[0]).name == "glm-batch"
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    context = command.make_context(words[1], words[2:], resilient_parsing=False)
    if context.params["until"] is not None:
        from datetime import datetime

        assert seconds_until(context.params["until"], datetime.now()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_files_fit_their_schemas(name: str) -> None:
    version, kind, spec = KINDS[name]
    schema = section(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )
    content = load(name)
    jsonschema.validate(content, schema)
    for pod in every(content, "template"):
        volumes = {volume["name"] for volume in pod.get("spec", {}).get("volumes", [])}
        mounted = {mount["name"] for mount in next(every(pod, "volumeMounts"), [])}
        assert mounted == volumes or "jobTemplate" in content["spec"]
    assert all(len(image.split(":")) == 2 for image in every(content, "image"))


def test_the_cron_jobs_command_and_time_are_valid() -> None:
    spec = load("cronjob.yaml")["spec"]
    check_schedule(spec["schedule"])
    for command in every(spec, "command"):
        check_command(command)


def test_the_ray_jobs_command_is_valid() -> None:
    check_command(load("rayjob.yaml")["spec"]["entrypoint"].split())


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_ray_asks_for_a_token_and_nothing_is_exposed(name: str) -> None:
    (cluster,) = [
        spec for key in ("rayClusterSpec", "rayClusterConfig") for spec in every(load(name), key)
    ]
    # KubeRay then gives each container the token, and asks with it itself, too; variables alone
    # would lock it out.
    assert cluster["authOptions"] == {"mode": "token"}
    assert not re.search("RAY_AUTH_", (DEPLOY / name).read_text())
    text = (DEPLOY / name).read_text()
    assert not re.search(r"LoadBalancer|NodePort|Ingress|hostNetwork|dashboard-host", text)


def test_the_ray_service_serves_an_application_that_exists() -> None:
    import importlib

    config = yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert set(application["args"]) == {"config"}


def check_schedule(text: str) -> None:
    """Five fields of a crontab, each within its range."""
    fields = text.split()
    assert len(fields) == 5
    for field, (low, high) in zip(
        fields, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True
    ):
        for part in field.split(","):
            match = re.fullmatch(r"(\*|(\d+)(?:-(\d+))?)(?:/(\d+))?", part)
            assert match, field
            assert all(low <= int(number) <= high for number in match.group(2, 3) if number), field


def test_the_crontab_is_valid() -> None:
    lines = [
        line
        for line in (DEPLOY / "crontab").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    (entry,) = [line for line in lines if not re.match(r"[A-Z]+=", line)]
    *schedule, command = entry.split(maxsplit=5)
    check_schedule(" ".join(schedule))
    assert "%" not in command  # which a crontab would take for the end of the line
    words = command.partition(" && ")[2].split()
    check_command([word for word in words if ">>" not in word])


def test_the_systemd_units_are_valid(tmp_path: Path) -> None:
    service = (DEPLOY / "glm-batch.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", service, re.MULTILINE)
    check_command(command.split())
    timer = (DEPLOY / "glm-batch.timer").read_text()
    assert "Persistent=true" in timer
    assert "OnCalendar=" in timer
    if (analyze := shutil.which("systemd-analyze")) is None:
        return
    # The check looks for the command and the user, which only a machine with glm-batch installed
    # has.
    service = service.replace(command.split()[0], shutil.which("true") or "/bin/true")
    (tmp_path / "glm-batch.service").write_text(service.replace("User=glm-batch", "User=root"))
    (tmp_path / "glm-batch.timer").write_text(timer)
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", "glm-batch.service", "glm-batch.timer"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "glm-batch" not in done.stderr


@pytest.fixture
def token_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Ray head with token authentication and a job server on loopback; gives the environment of
    its users.
    """
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "glm-batch"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m glm_batch.jobs "$@"\n')
    shim.chmod(0o755)
    ports = [free_port() for _ in range(4)]
    paths = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": ":".join(paths), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_JOB_SERVER": f"http://127.0.0.1:{ports[0]}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(Path("/tmp") / f"ray-{secrets.token_hex(4)}"),
    }  # fmt: skip
    options = [
        "--head", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[0]}",
        f"--port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}", "--node-ip-address=127.0.0.1",
        "--num-cpus=3", f"--object-store-memory={160 << 20}", f"--temp-dir={environment['RAY_TMPDIR']}",
        f"--ray-client-server-port={ports[3]}", "--block",
    ]  # fmt: skip
    head = subprocess.Popen(
        ["ray", "start", *options], env=environment, cwd=tmp_path, start_new_session=True,
        stdout=(tmp_path / "head.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        await_job_server(environment, head, tmp_path / "head.log")
        yield environment
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        # asked to end, it would wait half a minute for its agents
        for process in [psutil.Process(head.pid), *family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def await_job_server(environment: dict[str, str], head: subprocess.Popen[bytes], log: Path) -> None:
    import time

    import httpx

    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + 180
    while True:
        try:
            if httpx.get(
                f"{environment['RAY_JOB_SERVER']}/api/jobs/", headers=headers, timeout=5
            ).is_success:
                return
        except httpx.HTTPError:
            pass
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


@pytest.mark.slow
def test_a_run_can_be_submitted_to_a_cluster_with_a_token(
    work: Any, token_cluster: dict[str, str]
) -> None:
    """The RayJob's entrypoint and submit.sh as they stand, on a real cluster; strangers are turned
    away.
    """
    import httpx

    work.write_job()
    assert httpx.get(f"{token_cluster['RAY_JOB_SERVER']}/api/jobs/").status_code in (401, 403)
    words = load("rayjob.yaml")["spec"]["entrypoint"].split()
    words[2] = str(work.root / "job.yaml")
    data = [f"{work.root}/data/*.parquet", f"{work.root}/data/*.jsonl"]
    overrides = [f"model={work.root}/model", f"input={json.dumps(data)}", f"output={work.root}/out"]
    options = [option for each in (*overrides, "max_error_rate=1.0") for option in ("--set", each)]
    command = [str(DEPLOY / "submit.sh"), *words[2:], *options]
    done = subprocess.run(command, env=token_cluster, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"output"')]
    said = json.loads(line)
    assert (said["state"], said["rows"], said["processed_rows"]) == ("finished", 8, 8)
    wrong = subprocess.run(
        command, env=token_cluster | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert wrong.returncode != 0
