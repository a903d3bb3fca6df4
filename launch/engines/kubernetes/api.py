"""Requests to the API server of a cluster, as plain JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from launch.engines.kubernetes.access import access, no_way
from service.basics.errors import EvenstepError, SpecError, printable
from service.spec.part import DNS_LABEL, DNS_NAME, PATTERNS_IN_WORDS

FIELD_MANAGER = "evenstep"
_STRICT = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
_SHOWN_LETTERS = 200
_PATHS = {
    "ServiceAccount": "api/v1/namespaces/{namespace}/serviceaccounts",
    "ConfigMap": "api/v1/namespaces/{namespace}/configmaps",
    "PersistentVolumeClaim": "api/v1/namespaces/{namespace}/persistentvolumeclaims",
    "Service": "api/v1/namespaces/{namespace}/services",
    "Secret": "api/v1/namespaces/{namespace}/secrets",
    "Pod": "api/v1/namespaces/{namespace}/pods",
    "Event": "api/v1/namespaces/{namespace}/events",
    "NetworkPolicy": "apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "Job": "apis/batch/v1/namespaces/{namespace}/jobs",
    "JobSet": "apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets",
    "TrainJob": "apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs",
    "Workload": "apis/kueue.x-k8s.io/v1beta1/namespaces/{namespace}/workloads",
    "PodGroup.scheduling.volcano.sh": (
        "apis/scheduling.volcano.sh/v1beta1/namespaces/{namespace}/podgroups"
    ),
    "PodGroup.scheduling.x-k8s.io": (
        "apis/scheduling.x-k8s.io/v1alpha1/namespaces/{namespace}/podgroups"
    ),
    "TrainingRuntime": "apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainingruntimes",
}


class ClusterError(EvenstepError):
    """The cluster refused a request, or did not respond; the message says what to do."""


class ClusterUnreachable(ClusterError):
    """The cluster did not respond, or temporarily could not: the request may be repeated."""


class Conflict(SpecError):
    """An object of this name exists already, or is another one than expected."""


class Api:
    """One namespace of one cluster."""

    def __init__(self, *, namespace: str | None = None, say: Callable[[str], None]) -> None:
        """Find the cluster as kubectl does: KUBECONFIG, ~/.kube/config, or the pod's own account.

        Args:
            namespace: None is the one of the context.
            say: prints warnings of the server.
        Raises:
            SpecError: there is no cluster configuration, or no namespace can have this name.
        """
        if namespace is not None and not re.fullmatch(DNS_LABEL, namespace):
            raise SpecError(
                f"--namespace: must be {PATTERNS_IN_WORDS[DNS_LABEL]}, but is {namespace!r}. "
                "Leave it out for the one of the kubectl context."
            )
        config = access()
        self.default_namespace = config.namespace or "default"
        if not re.fullmatch(DNS_LABEL, self.default_namespace):
            raise no_way(
                f"the context {config.context_name} has the namespace {config.namespace!r}, which "
                f"must be {PATTERNS_IN_WORDS[DNS_LABEL]}"
            )
        from httpx2 import InvalidURL
        from lightkube.config.client_adapter import Client, ConnectionParams
        from lightkube.core.exceptions import ConfigError

        try:
            self._client = Client(config, ConnectionParams())
        except (ConfigError, InvalidURL, OSError, ValueError) as error:
            raise no_way(f"the context {config.context_name} cannot be used: {error}") from error
        self.namespace = self.default_namespace if namespace is None else namespace
        self._server = config.cluster.server
        self._say = say

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object, or None if it does not exist."""
        found = self._call("GET", self._path(kind, name), missing=True, having="metadata")
        return found or None

    def find(self, kind: str, **selectors: str) -> list[dict[str, Any]]:
        """The objects that match the selectors."""
        answer = self._call("GET", self._path(kind), having="items", params=selectors)
        found: list[dict[str, Any]] = answer["items"]
        return found

    def apply(self, made: dict[str, Any]) -> None:
        """Create the object, or update it to this state (server-side apply)."""
        kind = made["kind"]
        if kind not in _PATHS:  # two projects use this kind
            kind += f".{made['apiVersion'].partition('/')[0]}"
        self._call(
            "PATCH",
            self._path(kind, made["metadata"]["name"]),
            params=_STRICT,
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(made),
        )

    def create(self, made: dict[str, Any]) -> dict[str, Any]:
        """Create the object, and return it as the server has it.

        Raises:
            Conflict: one of this name exists.
        """
        self._path(made["kind"], made["metadata"]["name"])  # only to check the name
        path = self._path(made["kind"])
        return self._call("POST", path, params=_STRICT, having="metadata", json=made)

    def merge(self, kind: str, name: str, change: dict[str, Any]) -> dict[str, Any] | None:
        """Change some keys of the object (a JSON merge patch) and return it; None if it does not
        exist.

        Raises:
            Conflict: `change` names a uid or a version that the object does not have.
        """
        found = self._call(
            "PATCH",
            self._path(kind, name),
            missing=True,
            having="metadata",
            params=_STRICT,
            headers={"Content-Type": "application/merge-patch+json"},
            content=json.dumps(change),
        )
        return found or None

    def delete(
        self, kind: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> dict[str, Any] | None:
        """Delete the object after its dependents; None if it does not exist.

        Returns the server's answer: the object as it was, or a status.

        Args:
            uid: delete only the object with this uid.
            version: delete it only if it has not changed since this version.
        Raises:
            Conflict: the object is another one, or has changed.
        """
        wish: dict[str, Any] = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Foreground",
        }
        only = {"uid": uid, "resourceVersion": version}
        if any(only.values()):
            wish["preconditions"] = {key: value for key, value in only.items() if value}
        return self._call("DELETE", self._path(kind, name), missing=True, json=wish) or None

    def log(self, pod: str, *, follow: bool = False, lines: int | None = None) -> Iterator[str]:
        """The lines of a pod's log, as they arrive.

        Raises:
            ClusterError: there is no log yet, because the container has not started.
        """
        import httpx2

        params = {"follow": "true"} if follow else {}
        params |= {"tailLines": str(lines)} if lines is not None else {}
        url, patience = f"{self._path('Pod', pod)}/log", httpx2.Timeout(10.0, read=None)
        with (
            self._answering(),
            self._client.stream("GET", url, params=params, timeout=patience) as answer,
        ):
            if answer.status_code >= 400:
                answer.read()
                if answer.status_code == 400:
                    message = _status(answer.text).get("message", answer.text)
                    raise ClusterError(f"There is no log yet: {message}.")
                raise _refusal(answer.status_code, answer.text, self.namespace)
            if answer.status_code >= 300 or "html" in answer.headers.get("Content-Type", ""):
                answer.read()
                raise self._no_cluster(answer.status_code, answer.text)
            yield from answer.iter_lines()

    def _path(self, kind: str, name: str | None = None) -> str:
        """The path of one object; without a name, of all objects of its kind.

        Raises:
            SpecError: no object can have this name. An empty one would be the path of all
                objects, which a DELETE would delete; one with / or ? the path of another object.
        """
        path = "/" + _PATHS[kind].format(namespace=self.namespace)
        if name is None:
            return path
        if not re.fullmatch(DNS_NAME, name):
            raise SpecError(
                f"The name of a {kind} must be {PATTERNS_IN_WORDS[DNS_NAME]}; but is {name!r}."
            )
        return f"{path}/{name}"

    def _call(
        self, method: str, path: str, *, missing: bool = False, having: str = "", **rest: Any
    ) -> dict[str, Any]:
        """The server's answer; an empty one for a missing object, if `missing` is allowed.

        Args:
            having: a key of every such answer of a cluster.
        """
        with self._answering():
            answer = self._client.request(method, path, **rest)
        for warning in answer.headers.get_list("Warning"):
            self._say(f"warning: {_unquoted(warning)}")
        if answer.status_code == 404 and missing and _details(answer.text).get("name"):
            return {}
        if answer.status_code >= 400:
            raise _refusal(answer.status_code, answer.text, self.namespace)
        found = _object(answer.text)
        if answer.status_code >= 300 or found is None or (having and having not in found):
            raise self._no_cluster(answer.status_code, answer.text)
        return found

    def _no_cluster(self, code: int, text: str) -> ClusterUnreachable:
        return ClusterUnreachable(
            f"{self._server} answered {code}, but not as a cluster: {_words(text) or 'no text'}. "
            "It may be a proxy, or a page to sign in. Does kubectl get pods work? It uses the same "
            "kubeconfig."
        )

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """A context that turns connection errors into messages.

        Raises:
            ClusterUnreachable: the cluster does not respond.
            ClusterError: the sign-in failed.
        """
        import httpx2
        from lightkube.core.exceptions import ConfigError

        try:
            yield
        except httpx2.TransportError as error:
            raise ClusterUnreachable(
                f"The cluster at {self._server} does not respond ({error}). Is the VPN up, and is "
                "it the right context? See: kubectl config get-contexts"
            ) from error
        except (ConfigError, OSError, KeyError, TypeError, ValueError) as error:
            # The sign-in command of the kubeconfig: it is missing, fails, or prints nothing.
            told = str(error) if isinstance(error, ConfigError | OSError) else repr(error)
            raise ClusterError(
                f"The sign-in to the cluster at {self._server} failed: {told}. Does kubectl get "
                "pods work? It uses the same kubeconfig."
            ) from error


def _refusal(code: int, text: str, namespace: str) -> EvenstepError:
    """The server's error, and what to do about it."""
    message = _status(text).get("message") or _words(text)
    if code == 401:
        return ClusterError(
            "The cluster did not accept your credentials (401): sign in again, as for kubectl."
        )
    if code == 403:
        return ClusterError(f"{message}.{_role(message, namespace)}")
    if code == 404 and _details(text).get("kind") == "namespaces":
        return SpecError(f"{message}. Set kubernetes.namespace to one that exists.")
    if code == 404:
        return ClusterError(
            f"The cluster does not know this kind of object ({message or 'not found'}): "
            "the target's controller is not installed. Use --target job."
        )
    if code == 409:
        return Conflict(f"The cluster refuses: {message}.")
    if code in (400, 422):
        return SpecError(f"The cluster refuses: {message}.")
    kind = ClusterUnreachable if code in (429, 500, 502, 503, 504) else ClusterError
    return kind(f"The cluster answered {code}: {message}.")


def _role(message: str, namespace: str) -> str:
    """The commands with which an administrator can grant the missing permission."""
    found = re.search(
        r'User "([^"]+)" cannot (\w+) resource "([\w/]+)" in API group "([\w.]*)"', message
    )
    if not found:
        return ""
    user, verb, resource, group = found.groups()
    kind = f"{resource}.{group}" if group else resource
    return (
        f" Ask the cluster's administrator for it: kubectl create role evenstep -n {namespace} "
        f"--verb={verb} --resource={kind}; kubectl create rolebinding evenstep -n {namespace} "
        f"--role=evenstep --user={user}. All required permissions are in k8s/role.yaml of "
        "Evenstep's repository."
    )


def _status(text: str) -> dict[str, Any]:
    return _object(text) or {}


def _words(text: str) -> str:
    """The beginning of a text that is no answer of a cluster, such as a page of a proxy."""
    words = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    return printable(words[:_SHOWN_LETTERS])


def _object(text: str) -> dict[str, Any] | None:
    """The object of an answer; None if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _details(text: str) -> dict[str, Any]:
    return _status(text).get("details") or {}


def _unquoted(warning: str) -> str:
    """The text of a Warning header: 299 - "the text"."""
    found = re.search(r'"(.*)"', warning)
    return found[1].replace('\\"', '"') if found else warning
