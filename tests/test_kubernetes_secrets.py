"""Secrets and ConfigMaps reach a pod by name and key: as variables, as files, as credentials."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_kubernetes_manifests import KEYS_OF_OBJECTS, TARGETS, job, pod_of

from launch.engines.kubernetes.manifests import render, to_yaml
from launch.engines.kubernetes.states import advised, condition
from service.basics.errors import SpecError
from service.spec.kubernetes import KubernetesSpec


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return dict(container)


@pytest.mark.parametrize("target", TARGETS)
def test_a_variable_is_the_key_of_an_object(target: Any) -> None:
    container = container_of(pod_of(render(job(**KEYS_OF_OBJECTS), target=target)))
    env = {each["name"]: each for each in container["env"]}
    assert len(env) == len(container["env"]), "each variable once"
    token = {"name": "hub", "key": "token"}
    assert env["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}}
    proxy = {"name": "proxy", "key": "url", "optional": True}
    assert env["HTTPS_PROXY"]["valueFrom"] == {"configMapKeyRef": proxy}
    assert "value" not in env["HOME"], "it replaces Evenstep's own"


def test_one_key_is_one_file_and_the_pod_gets_no_other() -> None:
    pod = pod_of(render(job(**KEYS_OF_OBJECTS)))
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: each for each in container_of(pod)["volumeMounts"]}
    for path, kind, key in (
        ("/etc/ssl/certs/team.crt", "configMap", "ca.crt"),
        ("/keys/hub", "secret", "token"),
    ):
        assert (mounts[path]["subPath"], mounts[path]["readOnly"]) == (key, True)
        assert volumes[mounts[path]["name"]][kind]["items"] == [{"key": key, "path": key}]
    assert mounts["/data"]["subPath"] == "imagenet/2012"


def test_credentials_of_a_storage_are_a_file_that_its_variable_names() -> None:
    pod = pod_of(render(job(**KEYS_OF_OBJECTS)))
    container = container_of(pod)
    env = {each["name"]: each.get("value") for each in container["env"]}
    paths = {each["mountPath"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    for variable, key, secret in (
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", "s3-keys"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "key.json", "gcs-key"),
    ):
        directory, _, file = str(env[variable]).rpartition("/")
        assert file == key
        source = {"secretName": secret, "defaultMode": 0o440}
        assert volumes[paths[directory]["name"]]["secret"] == source
        assert paths[directory]["readOnly"] is True
    assert pod["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror"}], "each once"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two objects for one variable": (
        {"env_from": {"A": {"secret": "s", "config_map": "c", "key": "k"}}},
        "kubernetes.env_from.A: must have one of secret and config_map, but has secret and config",
    ),
    "no object": (
        {"env_from": {"A": {"key": "k"}}},
        "kubernetes.env_from.A: must have one of secret and config_map, but has none",
    ),
    "no key": (
        {"env_from": {"A": {"secret": "s"}}},
        "kubernetes.env_from.A.key: missing; add key: token",
    ),
    "a value where a key belongs": (
        {"env_from": {"A": "hf_xyz"}},
        "kubernetes.env_from.A: must be a mapping of keys to values, but is 'hf_xyz'",
    ),
    "a key that none can be": (
        {"env_from": {"A": {"secret": "s", "key": "../k"}}},
        "kubernetes.env_from.A.key: must be a key of a Secret or ConfigMap: letters, digits, - _",
    ),
    "an unknown key": (
        {"env_from": {"A": {"secret": "s", "kee": "k"}}},
        "kubernetes.env_from.A.kee: unknown key; did you mean 'key'?",
    ),
    "a variable that none can be": (
        {"env_from": {"1 A": {"secret": "s", "key": "k"}}},
        "kubernetes.env_from: must be the name of an environment variable, but is '1 A'",
    ),
    "one variable in two places": (
        {"env": {"A": "1"}, "env_from": {"A": {"secret": "s", "key": "k"}}},
        "kubernetes: must set A in env or in env_from, but has it in both",
    ),
    "a variable that follows from the nodes": (
        {"env_from": {"PET_NNODES": {"config_map": "c", "key": "k"}}},
        "kubernetes.env_from.PET_NNODES: it follows from nodes, processes_per_node and port",
    ),
    "the value of a secret": (
        {"env": {"HF_TOKEN": "a1b2c3d4e5f6a7b8"}},
        "kubernetes.env.HF_TOKEN contains a secret, which spec.yaml would show to everybody who "
        "can read the run. Keep it in a Secret, which the pods can read as a file: "
        "kubernetes.mounts, or kubernetes.wandb_secret for the key of W&B; or as a variable: "
        "kubernetes.env_from.",
    ),
    "a key of a claim": (
        {"mounts": [{"path": "/d", "claim": "c", "key": "k"}]},
        "kubernetes.mounts.0: must have sub_path and no key, as a claim has directories",
    ),
    "a directory of a Secret": (
        {"mounts": [{"path": "/d", "secret": "c", "sub_path": "k"}]},
        "kubernetes.mounts.0: must have key and no sub_path, as only a claim has directories",
    ),
    "a directory beside the claim": (
        {"mounts": [{"path": "/d", "claim": "c", "sub_path": "a/../../b"}]},
        "kubernetes.mounts.0.sub_path: must be a relative path without .., spaces and :",
    ),
    "a mount over the credentials": (
        {"s3_secret": "s", "mounts": [{"path": "/var/run/secrets/evenstep/s3", "claim": "c"}]},
        "kubernetes.mounts.0.path: /var/run/secrets/evenstep/s3 is Evenstep's own",
    ),
    "a mount over the secret of the meeting": (
        {"nodes": 2, "mounts": [{"path": "/var/run/secrets/evenstep/meeting", "claim": "c"}]},
        "kubernetes.mounts.0.path: /var/run/secrets/evenstep/meeting is Evenstep's own",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_reported_with_its_place(mistake: str) -> None:
    options, message = REFUSED[mistake]
    with pytest.raises(SpecError, match=re.escape(message)):
        render(job(**options))


@pytest.mark.parametrize(
    "told",
    [
        "CreateContainerConfigError: couldn't find key token in Secret ml/hub",
        'CreateContainerConfigError: secret "hub" not found',
        'MountVolume.SetUp failed for volume "mount-2" : references non-existent secret key: token',
    ],
)
def test_the_status_says_where_a_missing_key_is_asked_for(told: str) -> None:
    assert advised(told).startswith(f"{told} -> create the Secret or ConfigMap, with its key")


def test_a_pod_that_waits_for_a_secret_is_no_failure() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}
    pod = {"status": {"containerStatuses": [{"state": {"waiting": waiting}}]}, "metadata": {}}
    assert "kubernetes.env_from" in advised(condition(pod))


def test_a_key_may_begin_with_a_dot_and_no_path_with_two() -> None:
    (mount,) = KubernetesSpec(
        image="a", mounts=({"path": "/d", "claim": "c", "sub_path": ".cache/a..b"},)
    ).mounts
    assert mount.sub_path == ".cache/a..b"
    rendered = to_yaml(render(job(env_from={"A": {"secret": "s", "key": ".dockerconfigjson"}})))
    assert "key: .dockerconfigjson" in rendered
