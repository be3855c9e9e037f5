"""The files in `docker/`: valid for compose and KubeRay, closed to the outside, installed as CI installs."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SCHEMAS = ROOT / "tests" / "fixtures" / "schemas"


def schema(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((SCHEMAS / name).read_bytes()))


def closed(node: Any) -> Any:
    """Kubernetes drops fields that a schema does not know; here they are errors, because they are misspelt."""
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: closed(value) for key, value in node.items()}
    known = found.get("properties")
    free = found.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in found
    if isinstance(known, dict) and not free and "type" in found:
        found["additionalProperties"] = False
    return found


@cache
def rayjob_schema() -> dict[str, Any]:
    found = closed(schema("kuberay-rayjob-v1.json.gz"))
    found["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return found


def rayjob() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "rayjob.yaml").read_text())


def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_rayjob_is_one_that_kuberay_takes() -> None:
    jsonschema.Draft7Validator(rayjob_schema()).validate(rayjob())


def test_the_compose_file_is_one_that_compose_takes() -> None:
    jsonschema.Draft7Validator(schema("compose-spec.json.gz")).validate(compose())


@pytest.mark.parametrize(
    "where", [("spec",), ("spec", "rayClusterSpec"), ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")]
)
def test_a_misspelt_field_is_seen(where: tuple[str, ...]) -> None:
    job = rayjob()
    part = job
    for name in where:
        part = part[name]
    part["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.Draft7Validator(rayjob_schema()).validate(job)


def test_compose_refuses_a_misspelt_key() -> None:
    file = compose()
    file["services"]["head"]["port"] = ["1:1"]
    with pytest.raises(jsonschema.ValidationError, match="port"):
        jsonschema.Draft7Validator(schema("compose-spec.json.gz")).validate(file)


def test_nothing_is_published_beyond_loopback_and_everything_wants_the_token() -> None:
    services = compose()["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8265:8265"]
    assert all(service["environment"]["RAY_AUTH_MODE"] == "token" for service in services.values())
    assert all(service["environment"]["RAY_USAGE_STATS_ENABLED"] == "0" for service in services.values())
    assert not any("network_mode" in service for service in services.values())
    cluster = rayjob()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert "serviceType" not in cluster["headGroupSpec"]  # ClusterIP


def dockerfile(name: str) -> str:
    text = (DOCKER / name).read_text()
    return re.sub(r"\\\n", " ", text)


def planned(*arguments: str) -> list[str]:
    """What `make install` would run, from the pip commands on."""
    result = subprocess.run(
        ["make", "--always-make", "--dry-run", "install", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in result.stdout.splitlines() if " pip " in line]


@pytest.mark.parametrize(
    ("name", "half", "absent"),
    [("pipeline.Dockerfile", "pipeline", "trainer"), ("trainer.Dockerfile", "trainer", "pipeline")],
)
def test_images_install_with_the_steps_of_ci(name: str, half: str, absent: str) -> None:
    steps = [line for line in dockerfile(name).splitlines() if "make install" in line]
    assert len(steps) == 1
    arguments = shlex.split(steps[0])[3:]
    extras = arguments[0].removeprefix("EXTRAS=").split(",")
    assert half in extras
    assert absent not in extras
    ci, image = planned(), planned(*arguments)
    assert len(image) == len(ci) == 3
    assert [re.sub(r"\.\[[^]]*\]", ".[…]", line) for line in image] == [
        re.sub(r"\.\[[^]]*\]", ".[…]", line) for line in ci
    ]
    assert all("constraints.txt" in line for line in image[1:])
    assert f"[{','.join(extras)}]" in image[-1]


@pytest.mark.parametrize("name", ["pipeline.Dockerfile", "trainer.Dockerfile"])
def test_what_an_image_copies_is_there_and_it_does_not_run_as_root(name: str) -> None:
    lines = dockerfile(name).splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
    assert lines.index("USER ola") < next(i for i, line in enumerate(lines) if "make install" in line)
    assert not any(line.startswith("USER root") for line in lines)


def needed(image: str) -> list[str]:
    """The requirements of the extras that an image installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    step = next(line for line in dockerfile(image).splitlines() if "make install" in line)
    extras = step.rpartition("EXTRAS=")[2].split(",")
    return [*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra])]


def test_the_trainers_image_has_no_ray_in_its_extras() -> None:
    assert not any(re.match(r"ray\b|diffusers\b", need) for need in needed("trainer.Dockerfile"))


def test_the_pipelines_image_has_what_a_rayjob_is_submitted_to() -> None:
    """KubeRay submits through the dashboard, and metrics leave through the agents: `ray` alone has neither."""
    assert any(need.startswith("ray[default]") for need in needed("pipeline.Dockerfile"))


def test_the_entry_points_are_commands_that_olapipe_takes() -> None:
    import typer.main

    from olapipe.cli import app

    known = {
        option for parameter in typer.main.get_command(app).commands["extract"].params for option in parameter.opts
    }
    words = shlex.split(rayjob()["spec"]["entrypoint"])
    assert words[:2] == ["olapipe", "extract"]
    used = {word for word in [*words, *compose()["services"]["extract"]["entrypoint"]] if word.startswith("--")}
    assert used <= known
