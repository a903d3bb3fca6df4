"""Kubernetes as one of the engines: render, submit, status, logs, cancel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from launch.engines.contract import Say
from service.spec.models import Spec

if TYPE_CHECKING:
    from launch.engines.kubernetes.manifests import Target
    from launch.engines.kubernetes.pods import Manifest


def _target() -> click.Option:
    return click.Option(
        ["--target"],
        type=click.Choice(["job", "jobset", "kubeflow"]),
        default="job",
        show_default=True,
        help="The kind of object; jobset and kubeflow must be installed in the cluster.",
    )


class Kubernetes:
    """A Job, JobSet or TrainJob in a namespace. What it needs is imported when it is asked."""

    name = "kubernetes"
    about = "Run a job on a cluster."
    rendered = "the manifests of SPEC, for kubectl apply -f -"
    job_options: tuple[click.Option, ...] = (_target(),)
    run_options: tuple[click.Option, ...] = (
        _target(),
        click.Option(["-n", "--namespace"], help="Default: the one of the kubectl context."),
    )

    def render(self, spec: Spec, *, target: Target) -> str:
        """See `Engine`."""
        from launch.engines.kubernetes.manifests import to_yaml

        return to_yaml(_objects(spec, target))

    def submit(self, spec: Spec, *, waits: bool, say: Say, complain: Say, target: Target) -> None:
        """See `Engine`."""
        from launch.engines.kubernetes import jobs
        from launch.engines.kubernetes.api import Api, ClusterError

        objects = _objects(spec, target)
        namespace = spec.kubernetes.namespace if spec.kubernetes else None
        with Api(namespace=namespace, say=complain) as api:
            jobs.submit(api, objects, say=say)
            if waits:
                end = jobs.wait(api, jobs.KINDS[target], spec.name, say=complain)
                say(f"{spec.name}: {end}")
                if end.startswith("Failed"):
                    raise ClusterError(f"See: evenstep kubernetes logs {spec.name}")

    def status(
        self, name: str, *, complain: Say, target: Target, namespace: str | None
    ) -> Iterator[str]:
        """See `Engine`."""
        from launch.engines.kubernetes import jobs
        from launch.engines.kubernetes.api import Api

        with Api(namespace=namespace, say=complain) as api:
            yield from jobs.status(api, jobs.KINDS[target], name)

    def logs(
        self,
        name: str,
        *,
        rank: int,
        node: int | None,
        previous: bool,
        follow: bool,
        complain: Say,
        target: Target,
        namespace: str | None,
    ) -> Iterator[str]:
        """See `Engine`."""
        from launch.engines.kubernetes import jobs
        from launch.engines.kubernetes.api import Api

        which: dict[str, Any] = {"node": node, "rank": rank, "previous": previous}
        with Api(namespace=namespace, say=complain) as api:
            yield from jobs.logs(api, jobs.KINDS[target], name, **which, follow=follow)

    def cancel(self, name: str, *, complain: Say, target: Target, namespace: str | None) -> str:
        """See `Engine`."""
        from launch.engines.kubernetes import jobs
        from launch.engines.kubernetes.api import Api

        with Api(namespace=namespace, say=complain) as api:
            return jobs.cancel(api, jobs.KINDS[target], name)


def _objects(spec: Spec, target: Target) -> list[Manifest]:
    from launch.engines.kubernetes.manifests import code_beside, new_secret, render

    return render(spec, target=target, files=code_beside(spec), secret=new_secret())
