"""The section `kubernetes:`: where a job runs on a cluster."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.spec.part import (
    ABSOLUTE_PATH,
    DEVICE,
    DNS_LABEL,
    DNS_NAME,
    IMAGE,
    LABEL,
    LABEL_VALUE,
    QUANTITY,
    VARIABLE,
    Part,
    wrong,
)

Quantity = Annotated[str, Field(pattern=QUANTITY)]
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
DnsName = Annotated[str, Field(pattern=DNS_NAME)]


class TolerationSpec(Part):
    """A taint of cluster nodes that the pods put up with."""

    key: str | None = None
    """The taint's key; without one, every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """The taint's value, where it does."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; without one, every effect."""

    @model_validator(mode="after")
    def _value_where_it_matters(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise wrong("must have operator: Equal, or no value, but Exists has a value")
        if self.operator == "Equal" and self.key is None:
            raise wrong("must have a key, whose value is equal, but has none")
        return self


class MountSpec(Part):
    """Something of the namespace that the pods see as files: give claim, secret or config_map."""

    path: Annotated[str, Field(pattern=ABSOLUTE_PATH, examples=["/data"])]
    """Where it is seen."""
    claim: DnsName | None = None
    """A PersistentVolumeClaim."""
    secret: DnsName | None = None
    """A Secret."""
    config_map: DnsName | None = None
    """A ConfigMap."""
    read_only: bool = True
    """Whether a claim can only be read; the others always can only be read."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [k for k in ("claim", "secret", "config_map") if getattr(self, k) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise wrong(f"must have one of claim, secret and config_map, but has {has}")
        return self


class KubernetesSpec(Part):
    """Where and with what the job runs on a cluster; it never changes the result."""

    image: Annotated[
        str, Field(pattern=IMAGE, examples=["registry.example.com/team/evenstep:0.1.0"])
    ]
    """The container image, best by its digest."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods that train together."""
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    """Training processes of each pod, and so its devices."""
    device: Annotated[str, Field(pattern=DEVICE)] = "nvidia.com/gpu"
    """What the cluster calls a device, such as amd.com/gpu; `cpu` trains without one."""
    cpu: Quantity = "4"
    """Cores of each pod."""
    memory: Quantity = "16Gi"
    """Memory of each pod, with `shared_memory` in it."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm, through which loader workers and NCCL hand their data."""
    scratch: Quantity = "10Gi"
    """Size of /tmp, the one other place a pod can write to."""
    storage_claim: DnsName | None = None
    """A PersistentVolumeClaim that is there and holds the runs. Default: one is made."""
    storage: Quantity = "50Gi"
    """Size of the claim that is made."""
    storage_class: DnsName | None = None
    """Its storage class; with several nodes it must offer ReadWriteMany."""
    namespace: DnsLabel | None = None
    """The namespace. Default: the one of whoever applies it."""
    node_selector: dict[
        Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]
    ] = Field(default={})
    """Labels that the cluster's nodes must have."""
    tolerations: tuple[TolerationSpec, ...] = Field(default=(), strict=False)
    """Taints to put up with, besides the one of the devices."""
    topology: Annotated[str, Field(pattern=LABEL)] = "topology.kubernetes.io/zone"
    """Pods prefer nodes with one value of this label; `none` has no preference."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue; it then decides when the job starts."""
    priority_class: DnsName | None = None
    """Which jobs go first when there is not room for all."""
    image_pull_secret: DnsName | None = None
    """The Secret with which the image is fetched."""
    env: dict[Annotated[str, Field(pattern=VARIABLE)], str] = Field(default={})
    """Further environment variables."""
    mounts: tuple[MountSpec, ...] = Field(default=(), strict=False)
    """Further files: data sets, certificates, credentials."""
    wandb_secret: DnsName = "wandb"
    """The Secret whose `api-key` is the key of Weights & Biases; W&B is offline without it."""
    egress: tuple[str, ...] = Field(default=(), strict=False)
    """Address blocks the pods may speak to besides each other and DNS, such as 10.1.2.0/24."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often one node may fail on its own account before the job has failed."""
    grace_seconds: Annotated[int, Field(ge=30)] = 180
    """What a pod is given to save its state when it has to go."""
    deadline_seconds: Annotated[int, Field(ge=1)] = 604_800
    """The job has failed when it takes longer."""
    keep_seconds: Annotated[int, Field(ge=0)] = 86_400
    """How long a finished job is kept to be looked at; the runs stay."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Where the nodes meet."""
    meeting_seconds: Annotated[int, Field(ge=1)] = 600
    """How long a node waits there for the others before it starts again."""

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @field_validator("egress")
    @classmethod
    def _blocks_of_addresses(cls, egress: tuple[str, ...]) -> tuple[str, ...]:
        for block in egress:
            try:
                if "/" in block and ip_network(block):
                    continue
            except ValueError as error:
                raise wrong(f"must be blocks of addresses, but {error}") from error
            raise wrong(f"must be blocks of addresses, such as {block}/32, but has {block!r}")
        return egress

    @model_validator(mode="after")
    def _memory_holds_what_is_shared(self) -> Self:
        if quantity(self.shared_memory) >= quantity(self.memory):
            raise wrong(
                f"memory must be more than shared_memory ({self.shared_memory}), which is in it, "
                f"but is {self.memory}"
            )
        return self


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number: bytes of a size, cores of a cpu."""
    number = text.rstrip("mkMGTi")
    unit = text.removeprefix(number)
    powers = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * (powers | binary)[unit]
