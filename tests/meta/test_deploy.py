"""What deploy/ has, as far as can be checked where nothing of it can be built or applied: by the
linters and schemas of the field, and by holding its names against the tree and the program."""

from __future__ import annotations

import copy
import fnmatch
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from batch_app.api_server import BACKGROUND_STOP_S, SHUTDOWN_S, create_app
from batch_app.cli.program import app as program
from batch_app.config import Settings
from batch_app.registry import ModelRegistry

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))
UNITS = sorted(DEPLOY.glob("*.service"))
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
YAMLLINT = (
    "{extends: default, rules: {line-length: {max: 110}, document-start: disable, "
    "braces: {max-spaces-inside: 0}, comments: {min-spaces-from-content: 1}}}"
)
SERVER_STOP_S = SHUTDOWN_S + BACKGROUND_STOP_S
DRAIN_S = Settings.model_fields["drain_s"].default

Manifest = dict[str, Any]


def name_of(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def is_setting(variable: str) -> bool:
    """Whether it is none of ours, or a setting that there is."""
    name = variable.removeprefix("VLLM_BATCH_")
    return name == variable or name.lower() in Settings.model_fields


def is_verb(words: list[str]) -> bool:
    """Whether the program has this command and its options."""
    command: Any = typer.main.get_command(program)
    known = command.commands.get(words[0])
    flags = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    return known is not None and all(
        any(flag in param.opts for param in known.params) for flag in flags
    )


def is_pinned(image: str) -> bool:
    tag = image.rpartition(":")[2] if ":" in image else ""
    return bool(re.search(r"\d", tag)) and tag != "latest"


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s", text)[1])  # type: ignore[index]


def test_there_is_something_to_check() -> None:
    assert DOCKERFILES
    assert len(COMPOSE_FILES) == len(UNITS) == 2
    assert [overlay.name for overlay in OVERLAYS] == ["cpu", "gpu", "ray"]


# -- Dockerfiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_hadolint_is_content_with(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (x.partition(" ") for x in joined.splitlines())
    ]


def is_sent_to_the_build(source: str) -> bool:
    """By the rules of .dockerignore: the last one that fits decides."""
    kept = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!")
        if not rule or rule.startswith("#"):
            continue
        if fnmatch.fnmatch(source, pattern) or pattern.startswith(f"{source}/"):
            kept = rule.startswith("!")
    return kept


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_is_made_of_what_there_is(path: Path) -> None:
    for word, rest in instructions(path):
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert is_sent_to_the_build(source), source
        if word == "FROM":
            assert is_pinned(rest.split()[0])
    text = path.read_text()
    [lock] = set(re.findall(r"requirements/[\w.]+\.lock", text))
    assert lock == f"requirements/{path.suffix[1:]}.lock"
    installs = re.findall(r"pip install ([^\n&|;]+)", text)
    assert installs
    assert all(install.startswith("--no-deps") for install in installs)


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_an_image_runs_as_nobody_in_particular(path: Path) -> None:
    said = dict(instructions(path))  # the last of each kind
    assert said["USER"] == "10001:10001"
    assert yaml.safe_load(said["ENTRYPOINT"]) == ["tini", "--", "vllm-batch"]
    assert is_verb(yaml.safe_load(said["CMD"]))
    for word, rest in instructions(path):
        if word == "ENV":
            assert all(is_setting(pair.partition("=")[0]) for pair in shlex.split(rest)), rest
    [checked] = re.findall(r"127\.0\.0\.1:(\d+)/livez", path.read_text())
    assert checked == said["EXPOSE"] == str(Settings.model_fields["port"].default)


# -- YAML and compose ------------------------------------------------------------------------------


def test_yamllint_is_content() -> None:
    command = [sys.executable, "-m", "yamllint", "--strict", "-d", YAMLLINT, DEPLOY]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(params=COMPOSE_FILES, ids=name_of)
def compose(request: pytest.FixtureRequest) -> Manifest:
    site: Manifest = yaml.safe_load(request.param.read_text())
    return site


def test_compose_names_only_what_it_has(compose: Manifest) -> None:
    services = compose["services"]
    for name, service in services.items():
        for secret in service.get("secrets", ()):
            assert secret in compose["secrets"], name
        for network in service.get("networks", ()):
            assert network in compose["networks"], name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"], source
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "test" in services[other]["healthcheck"]
        assert service.get("pid", "service:api").removeprefix("service:") in services


def test_compose_makes_the_images_that_it_runs(compose: Manifest) -> None:
    for service in compose["services"].values():
        build = service.get("build")
        if build is None:
            assert is_pinned(service["image"])
            continue
        for engine in ("cpu", "cuda"):
            dockerfile = build["dockerfile"].replace("${ENGINE:-cuda}", engine)
            assert (DEPLOY / build["context"] / dockerfile) in DOCKERFILES or (
                DEPLOY / build["context"] / dockerfile
            ).is_file()


def test_compose_runs_the_program_with_settings_that_there_are(compose: Manifest) -> None:
    found = set()
    for name, service in compose["services"].items():
        assert all(is_setting(variable) for variable in service.get("environment", ())), name
        command = service.get("command")
        if command is None:
            assert name == "database"
            continue
        text = command if isinstance(command, str) else command[0]
        words = shlex.split(text.partition("vllm-batch ")[2])
        assert is_verb(words), text
        found.add(words[0])
        grace_s = seconds(service["stop_grace_period"])
        assert grace_s > (SERVER_STOP_S if words[0] == "serve" else DRAIN_S + 10)
        assert service["restart"] == "unless-stopped"
    assert found == {"serve", "worker"}


def test_compose_publishes_the_api_alone_and_on_this_machine(compose: Manifest) -> None:
    published = {name: one["ports"] for name, one in compose["services"].items() if "ports" in one}
    assert list(published) == ["api"]
    [port] = published["api"]
    assert re.fullmatch(r"(\$\{PUBLISH:-)?127\.0\.0\.1:8080\}?:8080", port)


def test_passwords_are_files_that_git_leaves_alone() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.postgresql.yaml").read_text())
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    for secret in compose["secrets"].values():
        assert Path(secret["file"]).parts[0] == "secrets"
    assert compose["networks"]["inside"] == {"internal": True}
    assert compose["services"]["database"]["networks"] == ["inside"]


@pytest.mark.parametrize("path", UNITS, ids=name_of)
def test_units_run_the_program_with_settings_that_there_are(path: Path) -> None:
    text = path.read_text()
    [command] = re.findall(r"^ExecStart=\S+/vllm-batch (.+)$", text, re.MULTILINE)
    assert is_verb(command.split())
    for variable in re.findall(r"^Environment=(\w+)=", text, re.MULTILINE):
        assert is_setting(variable), variable


def test_the_workers_unit_keeps_caches_where_it_may_write() -> None:
    """The home folder is hidden from it. The image, which has the same needs, names the same."""
    text = (DEPLOY / "vllm-batch-worker.service").read_text()
    assert "ProtectHome=true" in text
    [state] = re.findall(r"^StateDirectory=(\S+)", text, re.MULTILINE)
    unit = dict(re.findall(r"^Environment=(\w+)=(\S+)", text, re.MULTILINE))
    said = [rest for word, rest in instructions(DEPLOY / "Dockerfile.cuda") if word == "ENV"]
    image = dict(pair.split("=", 1) for rest in said for pair in shlex.split(rest))
    caches = {
        "CUDA_CACHE_PATH",
        "FLASHINFER_WORKSPACE_BASE",
        "HF_HOME",
        "TRITON_CACHE_DIR",
        "XDG_CACHE_HOME",
    }
    for name in caches:
        assert Path(unit[name]).is_relative_to(Path("/var/lib") / state), name
        assert unit[name] == image[name]


def test_the_workers_unit_loads_cudas_module_as_root() -> None:
    """`+`: as root, with none of the unit's limits; `-`: also where there is no such tool."""
    text = (DEPLOY / "vllm-batch-worker.service").read_text()
    before = text.partition("ExecStart=")[0]
    assert "\nExecStartPre=-+/usr/bin/nvidia-modprobe -u -c 0\n" in before


# -- What a GPU needs ------------------------------------------------------------------------------


def test_images_have_what_triton_compiles_with() -> None:
    """gcc, with the C library's headers, and Python's headers, which the official images have."""
    for path in DOCKERFILES:
        rest = path.read_text().rpartition("\nFROM ")[2]  # the stage that runs
        assert rest.startswith("python:")
        assert re.search(r"apt-get install [^\n]*\bg\+\+", rest), path


def test_compose_without_an_image_of_ours_has_what_triton_compiles_with(compose: Manifest) -> None:
    for name, service in compose["services"].items():
        if "build" not in service and "vllm-batch" in str(service.get("command")):
            assert re.fullmatch(r"python:3\.\d+", service["image"]), f"{name}: slim has no gcc"


def test_workers_have_shared_memory_for_several_gpus(compose: Manifest) -> None:
    size, unit = re.fullmatch(r"(\d+)(\w\w)", compose["services"]["worker"]["shm_size"]).groups()  # type: ignore[union-attr]
    assert (int(size) >= 2, unit) == (True, "gb")


# -- Kubernetes ------------------------------------------------------------------------------------


def built(folder: Path) -> list[Manifest]:
    """What kustomize would make of a folder, of the few of its fields that are used here."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert said.keys() <= known, "teach this test the new field"
    manifests: list[Manifest] = []
    for name in said["resources"]:
        path = (folder / name).resolve()
        assert path.exists(), name
        manifests += built(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in said.get("patches", ()):
        chosen = [
            one
            for one in manifests
            if (one["kind"], one["metadata"]["name"])
            == (patch["target"]["kind"], patch["target"]["name"])
        ]
        assert chosen, f"the patch {patch['target']} fits nothing"
        for one in chosen:
            for operation in yaml.safe_load(patch["patch"]):
                add(one, operation)
    for image in said.get("images", ()):
        assert is_pinned(f":{image['newTag']}")
        used = [one for one in containers(manifests) if one["image"].split(":")[0] == image["name"]]
        assert used, f"nobody uses {image['name']}"
        for container in used:
            container["image"] = f"{image['newName']}:{image['newTag']}"
    for one in manifests:
        if said.get("namespace") and one["kind"] != "Namespace":
            one["metadata"]["namespace"] = said["namespace"]
    return manifests


def add(manifest: Manifest, operation: dict[str, Any]) -> None:
    """JSON patch's `add` to a mapping or a list's end. Raises KeyError where its parent isn't."""
    assert operation["op"] == "add"
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if isinstance(place, list):
        assert last == "-", "teach this test to insert"
        place.append(operation["value"])
    else:
        place[last] = operation["value"]


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """What makes pods: of a Ray cluster, one for its head and one for each group of nodes."""
    found = []
    for one in manifests:
        spec = one.get("spec", {})
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]] if is_ray(one) else [spec]
        found += [
            {"metadata": one["metadata"], "spec": group} for group in groups if "template" in group
        ]
    return found


def is_ray(manifest: Manifest) -> bool:
    return bool(manifest["apiVersion"] == "ray.io/v1")


def ours(manifests: list[Manifest]) -> list[Manifest]:
    """The pods whose first container is the program."""
    return [
        pod
        for pod in pods(manifests)
        if "command" not in pod["spec"]["template"]["spec"]["containers"][0]
        and "args" in pod["spec"]["template"]["spec"]["containers"][0]
    ]


def containers(manifests: list[Manifest]) -> list[Manifest]:
    return [one for pod in pods(manifests) for one in pod["spec"]["template"]["spec"]["containers"]]


@pytest.fixture(scope="module", params=OVERLAYS, ids=name_of)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return built(request.param)


@pytest.mark.parametrize("version", ["1.31", "latest"])
def test_manifests_fit_the_schemas_of_kubernetes(manifests: list[Manifest], version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that package's own reading of its schemas
        import kubernetes_validate
    if version == "latest":
        version = kubernetes_validate.latest_version()
    for one in manifests:
        if not is_ray(one):
            kubernetes_validate.validate(copy.deepcopy(one), version, strict=True)
    # The schema of a Ray cluster isn't among them; those of its pods are.
    for pod in pods([one for one in manifests if is_ray(one)]):
        template = copy.deepcopy(pod["spec"]["template"])
        as_pod = {"apiVersion": "v1", "kind": "Pod", **template}
        as_pod["metadata"]["name"] = "node"
        kubernetes_validate.validate(as_pod, version, strict=True)


def test_each_manifest_is_there_once_and_in_the_namespace(manifests: list[Manifest]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(names) == len(set(names))
    [namespace] = [one["metadata"]["name"] for one in manifests if one["kind"] == "Namespace"]
    assert all(
        one["metadata"]["namespace"] == namespace for one in manifests if one["kind"] != "Namespace"
    )


def test_pods_name_only_what_there_is(manifests: list[Manifest]) -> None:
    there = {(one["kind"], one["metadata"]["name"]): one for one in manifests}
    page = (ROOT / "docs" / "deploy.md").read_text()
    for pod in pods(manifests):
        labels = pod["spec"]["template"]["metadata"]["labels"]
        assert pod["spec"].get("selector", {"matchLabels": {}})["matchLabels"].items() <= (
            labels.items()
        )
        spec = pod["spec"]["template"]["spec"]
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in there
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounts = [mount for one in spec["containers"] for mount in one["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == volumes
        for one in spec["containers"]:
            assert is_pinned(one["image"])
            for source in one.get("envFrom", ()):
                assert ("ConfigMap", source["configMapRef"]["name"]) in there
            for variable in one["env"]:
                assert is_setting(variable["name"])
                if "value" in variable:
                    continue
                secret = variable["valueFrom"]["secretKeyRef"]  # made by hand, as the page says
                assert f"secret generic {secret['name']}" in page
                assert f"--from-literal {secret['key']}=" in page
    assert not [kind for kind, _ in there if kind == "Secret"]
    for (kind, _), one in there.items():
        if kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            selector = one["spec"].get("selector") or one["spec"]["podSelector"]
            labels = selector.get("matchLabels", selector)
            assert any(
                labels.items() <= pod["spec"]["template"]["metadata"]["labels"].items()
                for pod in pods(manifests)
            )


def test_pods_run_the_program_with_settings_and_models_that_can_be_read(
    manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}
    settings = maps["vllm-batch-settings"]
    assert all(is_setting(name) for name in settings)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    read = Settings()
    models = tmp_path / read.models.name
    models.write_text(maps["vllm-batch-models"][read.models.name])
    ModelRegistry.load(models)
    verbs = {}
    for pod in ours(manifests):
        spec = pod["spec"]["template"]["spec"]
        one = spec["containers"][0]
        assert is_verb(one["args"]), one["args"]
        verbs[one["args"][0]] = spec["terminationGracePeriodSeconds"]
        mounts = {mount["mountPath"] for mount in one["volumeMounts"]}
        assert {str(read.data_dir), str(read.models.parent), "/tmp"} <= mounts
    assert verbs["serve"] > SERVER_STOP_S
    assert verbs["worker"] > DRAIN_S + 10


def test_probes_ask_routes_that_there_are(manifests: list[Manifest], tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path / "data", benchmarks_dir=tmp_path))
    try:
        routes = {getattr(route, "path", "") for route in app.routes}
    finally:
        app.state.services.store.close()
    [api] = [one for one in containers(manifests) if one.get("args", [""])[0] == "serve"]
    assert api["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert api["readinessProbe"]["httpGet"]["path"] == "/readyz"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert api[probe]["httpGet"]["path"] in routes
        assert api[probe]["httpGet"]["port"] in {port["name"] for port in api["ports"]}
    [port] = api["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default


def test_pods_keep_to_the_restricted_profile(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        spec = pod["spec"]["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for one in spec["containers"]:
            context = one["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True


def test_gpus_are_asked_for_in_the_overlay_for_gpus() -> None:
    def gpus(folder: Path) -> list[str]:
        found = [one["resources"]["limits"] for one in containers(built(folder))]
        return [limits["nvidia.com/gpu"] for limits in found if "nvidia.com/gpu" in limits]

    assert gpus(KUBERNETES / "overlays" / "gpu") == ["1"]
    assert gpus(KUBERNETES / "overlays" / "cpu") == []
    assert gpus(KUBERNETES / "overlays" / "ray") == ["1"]


def test_where_engines_run_there_is_shared_memory(manifests: list[Manifest]) -> None:
    """vLLM's processes of several GPUs, and Ray's of a node, talk through /dev/shm."""
    found = 0
    for pod in pods(manifests):
        spec = pod["spec"]["template"]["spec"]
        memory = {
            volume["name"]
            for volume in spec.get("volumes", ())
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        }
        for container in spec["containers"]:
            if container.get("args") != ["worker"] and not container["name"].startswith("ray"):
                continue
            found += 1
            mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounted.get("/dev/shm") in memory, container["name"]
    assert found


def test_nodes_of_the_ray_cluster_listen_where_their_probes_ask() -> None:
    """The dashboard's agent opens no port: what it needs for that is not in the lock."""
    [cluster] = [one for one in built(KUBERNETES / "overlays" / "ray") if is_ray(one)]
    for pod in pods([cluster]):
        said = pod["spec"]["rayStartParams"]
        is_head = "groupName" not in pod["spec"]
        listens = "6379" if is_head else said["node-manager-port"]
        assert not 10_000 <= int(listens) < 20_000  # of a node's workers, unless told otherwise
        [one] = pod["spec"]["template"]["spec"]["containers"]
        for probe in ("livenessProbe", "readinessProbe"):
            assert str(one[probe]["tcpSocket"]["port"]) == listens


def test_a_worker_is_a_node_of_the_ray_cluster() -> None:
    manifests = built(KUBERNETES / "overlays" / "ray")
    [cluster] = [one for one in manifests if is_ray(one)]
    lock = (ROOT / "requirements" / "cuda.lock").read_text()
    assert f"ray=={cluster['spec']['rayVersion']}\n" in lock
    assert len({one["image"] for one in containers(manifests)}) == 1
    [worker] = [one for one in ours(manifests) if one["metadata"]["name"] == "vllm-batch-worker"]
    program, node = worker["spec"]["template"]["spec"]["containers"]
    assert node["command"][:2] == ["ray", "start"]
    # The operator names the head's service so.
    assert f"{cluster['metadata']['name']}-head-svc:6379" in node["args"]
    shared = {mount["mountPath"] for mount in node["volumeMounts"]}
    assert shared <= {mount["mountPath"] for mount in program["volumeMounts"]}
    everybody = [pod["spec"]["template"] for pod in [worker, *pods([cluster])]]
    assert all(template["metadata"]["labels"]["vllm-batch/ray"] == "true" for template in everybody)
    for one in (
        container for template in everybody for container in template["spec"]["containers"]
    ):
        assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= {variable["name"] for variable in one["env"]}
