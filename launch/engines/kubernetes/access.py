"""Finds the cluster and the credentials as kubectl does, with lightkube."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from service.basics.errors import SpecError

_DEFAULT = "~/.kube/config"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_LISTS = {"clusters": "cluster", "contexts": "context", "users": "user"}
_PATHS = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
_EXEC = "client.authentication.k8s.io"


def access() -> Any:
    """lightkube's `SingleConfig` for the current context, or for the service account of this pod.

    Raises:
        SpecError: there is no cluster configuration, or it is invalid.
    """
    try:
        from lightkube.config.kubeconfig import KubeConfig
        from lightkube.core.exceptions import ConfigError
        from msgspec import MsgspecError
    except ImportError as error:
        raise SpecError("Install evenstep[kubernetes] to use a cluster.") from error
    files = _files()
    try:
        if not files and _ACCOUNT.is_dir() and "KUBERNETES_SERVICE_HOST" in os.environ:
            return KubeConfig.from_service_account().get()
        if not files:
            raise ConfigError(f"there is no file {os.environ.get('KUBECONFIG') or _DEFAULT}")
        config = KubeConfig.from_dict(_merged(files)).get()
    except KeyError as error:
        raise no_way(f"its context names {error}, which is not in it") from error
    except (ConfigError, MsgspecError) as error:
        raise no_way(error) from error
    assert config is not None, "it raises if there is none"
    cluster, user = config.cluster, config.user
    assert user is not None, "a missing user was added above"
    for place in (cluster.certificate_auth, user.client_cert, user.client_key, user.token_file):
        if place is not None and not os.access(place, os.R_OK):
            raise no_way(f"the context {config.context_name} names {place}, which cannot be read")
    return config


def no_way(why: object) -> SpecError:
    return SpecError(
        f"No cluster can be reached: {why}. Set KUBECONFIG to the file that the cluster's "
        "administrator gave you, or put it at ~/.kube/config."
    )


def _files() -> list[Path]:
    """The existing files in KUBECONFIG, or the default file."""
    named = [name for name in os.environ.get("KUBECONFIG", "").split(os.pathsep) if name]
    files = [Path(name).expanduser() for name in named or [_DEFAULT]]
    return [file for file in files if file.is_file()]


def _merged(files: list[Path]) -> dict[str, Any]:
    """One configuration from several files; for a name in two files, the first one is used."""
    merged: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {key: {} for key in _LISTS}
    for file in files:
        config = _read(file)
        if not isinstance(config.get("current-context") or "", str):
            raise no_way(f"{file} is not a kubeconfig: its current-context is no text")
        if config.get("current-context"):
            merged.setdefault("current-context", config["current-context"])
        for key, inner in _LISTS.items():
            for entry in config.get(key) or []:
                name, content = entry.get("name"), entry.get(inner) or {}
                if not (isinstance(name, str) and isinstance(content, dict)):
                    told = f"each of its {key} must have a name, and a mapping as its {inner}"
                    raise no_way(f"{file} is not a kubeconfig: {told}")
                content = _complete(dict(content), file)
                found[key].setdefault(name, {"name": name, inner: content})
    context = found["contexts"].get(merged.get("current-context", ""), {"context": {}})["context"]
    if context and not context.get("user"):  # such as for kubectl proxy: without credentials
        context["user"] = "nobody"
        found["users"].setdefault("nobody", {"name": "nobody", "user": {}})
    return merged | {key: list(entries.values()) for key, entries in found.items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise no_way(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    entries = [config.get(key) or [] for key in _LISTS] if isinstance(config, dict) else [None]
    for several in entries:
        if not isinstance(several, list) or not all(isinstance(e, dict) for e in several):
            raise no_way(f"{file} is not a kubeconfig")
    return dict(config)


def _complete(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """With absolute paths, and a sign-in command in lightkube's format."""
    for key in _PATHS:
        if isinstance(content.get(key), str):
            content[key] = str(file.parent.absolute() / content[key])
    command = content.get("exec")
    if isinstance(command, dict):
        version = command.get("apiVersion")
        told = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
        known = {"name": "KUBERNETES_EXEC_INFO", "value": json.dumps(told)}
        # lightkube does not know v1, whose request and answer are the same.
        version = f"{_EXEC}/v1beta1" if version == f"{_EXEC}/v1" else version
        given = command.get("env") or []
        if not isinstance(given, list):
            raise no_way(f"{file} is not a kubeconfig: the env of a sign-in command is no list")
        variables = [*given, known]
        content["exec"] = command | {"apiVersion": version, "env": variables}
    return content
