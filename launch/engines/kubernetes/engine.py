"""Kubernetes as one of the engines: render, submit, status, logs, cancel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from launch.engines.contract import Say
from service.basics.errors import SpecError
from service.spec.models import Spec

if TYPE_CHECKING:
    from launch.engines.kubernetes.manifests import Target
    from launch.engines.kubernetes.pod.pods import Manifest


def _target() -> click.Option:
    return click.Option(
        ["--target"],
        type=click.Choice(["job", "jobset", "kubeflow"]),
        default="job",
        show_default=True,
        help="The kind of object; jobset and kubeflow must be installed in the cluster.",
    )


def _without_secret() -> click.Option:
    return click.Option(
        ["--without-secret"],
        is_flag=True,
        help="Leave out the Secret of the rendezvous; for manifests in a repository.",
    )


class Kubernetes:
    """A Job, JobSet or TrainJob in a namespace. Its modules are imported on first use."""

    name = "kubernetes"
    about = "Run a job on a cluster."
    rendered = "the manifests of SPEC, for kubectl apply -f -"
    job_options: tuple[click.Option, ...] = (_target(), _without_secret())
    run_options: tuple[click.Option, ...] = (
        _target(),
        click.Option(["-n", "--namespace"], help="Default: the one of the kubectl context."),
    )

    def options_in(self, spec: Spec) -> dict[str, Any]:
        """See `Engine`."""
        namespace = spec.kubernetes.namespace if spec.kubernetes else None
        return {"namespace": namespace} if namespace else {}

    def render(
        self, spec: Spec, *, target: Target, without_secret: bool, more: Sequence[str] = ()
    ) -> str:
        """See `Engine`."""
        from launch.engines.kubernetes.manifests import how_to_make_the_secret, notes, to_yaml

        objects = _objects(spec, target, more, without_secret=without_secret)
        lines = [
            *(how_to_make_the_secret(spec) if without_secret else []),
            *notes(spec, objects, target=target),
        ]
        return "".join(f"# {line}\n" for line in lines) + to_yaml(objects)

    def submit(
        self,
        spec: Spec,
        *,
        waits: bool,
        say: Say,
        complain: Say,
        target: Target,
        without_secret: bool,
        more: Sequence[str] = (),
    ) -> None:
        """See `Engine`."""
        from launch.engines.kubernetes import jobs
        from launch.engines.kubernetes.api import Api, ClusterError
        from launch.engines.kubernetes.manifests import notes
        from launch.engines.kubernetes.submission import submit

        objects = _objects(spec, target, more, without_secret=without_secret)
        cluster = spec.kubernetes
        if waits and cluster is not None and cluster.keep_seconds < jobs.LEAST_KEEP_SECONDS:
            raise SpecError(
                f"kubernetes.keep_seconds: the cluster deletes the job {cluster.keep_seconds} s "
                f"after its end, so --wait may not see how it ends. Use {jobs.LEAST_KEEP_SECONDS} "
                "or more, or leave out --wait."
            )
        for line in notes(spec, objects, target=target):
            complain(line)
        with Api(**self.options_in(spec), say=complain) as api:
            submit(api, objects, say=say)
            if waits:
                kind = jobs.KINDS[target]
                end = jobs.wait(api, kind, spec.name, say=complain)
                say(f"{spec.name}: {end}")
                if end.startswith("Failed"):
                    raise ClusterError(f"See: {jobs.command(api, kind, 'logs', spec.name)}")

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


def _objects(
    spec: Spec, target: Target, more: Sequence[str], *, without_secret: bool
) -> list[Manifest]:
    from launch.engines.kubernetes.manifests import code_beside, new_secret, render, with_words

    secret = None if without_secret else new_secret()
    objects = render(spec, target=target, files=code_beside(spec), secret=secret)
    return [with_words(each, more) for each in objects]
