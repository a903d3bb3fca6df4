"""The section `kubernetes:`: where a job runs on a cluster."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.spec.part import (
    ABSOLUTE_PATH,
    DATA_KEY,
    DEVICE,
    DNS_LABEL,
    DNS_NAME,
    IMAGE,
    LABEL,
    LABEL_VALUE,
    QUANTITY,
    RELATIVE_PATH,
    VARIABLE,
    Part,
    wrong,
)

Quantity = Annotated[str, Field(pattern=QUANTITY)]
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
DnsName = Annotated[str, Field(pattern=DNS_NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
DataKey = Annotated[str, Field(pattern=DATA_KEY)]


class TolerationSpec(Part):
    """A taint of cluster nodes that the pods tolerate."""

    key: str | None = None
    """The taint's key. Default: every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """`Exists` ignores the taint's value; `Equal` compares it."""
    value: str | None = None
    """The taint's value, with `Equal`."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect. Default: every effect."""

    @model_validator(mode="after")
    def _value_where_it_matters(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise wrong("must have operator: Equal, or no value, but Exists has a value")
        if self.operator == "Equal" and self.key is None:
            raise wrong("must have a key, whose value is equal, but has none")
        return self


class VariableSpec(Part):
    """Where the value of an environment variable is: a key of a Secret or of a ConfigMap."""

    secret: DnsName | None = None
    """A Secret."""
    config_map: DnsName | None = None
    """A ConfigMap."""
    key: Annotated[str, Field(pattern=DATA_KEY, examples=["token"])]
    """The key in it."""
    optional: bool = False
    """Start without the variable if the object or the key does not exist."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        _require_one(self, "secret", "config_map")
        return self


class MountSpec(Part):
    """A volume mounted in the pods: set one of claim, secret and config_map."""

    path: Annotated[str, Field(pattern=ABSOLUTE_PATH, examples=["/data"])]
    """The mount path in the pod."""
    claim: DnsName | None = None
    """A PersistentVolumeClaim."""
    secret: DnsName | None = None
    """A Secret."""
    config_map: DnsName | None = None
    """A ConfigMap."""
    key: DataKey | None = None
    """Mount only this key of the Secret or ConfigMap, as the file `path`."""
    sub_path: Annotated[str, Field(pattern=RELATIVE_PATH)] | None = None
    """Mount only this directory of the claim."""
    read_only: bool = True
    """Mount a claim read-only; Secrets and ConfigMaps are always read-only."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        _require_one(self, "claim", "secret", "config_map")
        if self.claim is not None and self.key is not None:
            raise wrong("must have sub_path and no key, as a claim has directories and no keys")
        if self.claim is None and self.sub_path is not None:
            raise wrong("must have key and no sub_path, as only a claim has directories")
        return self


def _require_one(part: Part, *keys: str) -> None:
    given = [key for key in keys if getattr(part, key) is not None]
    if len(given) != 1:
        *others, last = keys
        has = " and ".join(given) or "none"
        raise wrong(f"must have one of {', '.join(others)} and {last}, but has {has}")


class KubernetesSpec(Part):
    """How the job runs on a Kubernetes cluster; it never changes the result."""

    image: Annotated[
        str, Field(pattern=IMAGE, examples=["registry.example.com/team/evenstep:0.1.0"])
    ]
    """The container image, preferably with its digest."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods that train together."""
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    """Training processes in each pod; each uses one device."""
    device: Annotated[str, Field(pattern=DEVICE)] = "nvidia.com/gpu"
    """The cluster's resource name of a device, such as amd.com/gpu; `cpu` uses no device."""
    cpu: Quantity = "4"
    """Cores of each pod."""
    memory: Quantity = "16Gi"
    """Memory of each pod, including `shared_memory`."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm, which loader workers and NCCL use to exchange data."""
    scratch: Quantity = "10Gi"
    """Size of /tmp, the only other place where a pod can write."""
    storage_claim: DnsName | None = None
    """An existing PersistentVolumeClaim for the runs. Default: a new one is created."""
    storage: Quantity = "50Gi"
    """Size of the new claim."""
    storage_class: DnsName | None = None
    """Storage class of the new claim; with several nodes it must support ReadWriteMany."""
    namespace: DnsLabel | None = None
    """The namespace. Default: the one of the current kubectl context."""
    node_selector: dict[
        Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]
    ] = Field(default={})
    """Labels that the cluster's nodes must have."""
    tolerations: tuple[TolerationSpec, ...] = Field(default=(), strict=False)
    """Taints that the pods tolerate, in addition to the taint of the devices."""
    topology: Annotated[str, Field(pattern=LABEL)] = "topology.kubernetes.io/zone"
    """Pods prefer nodes that share the value of this label; `none` for no preference."""
    queue: DnsLabel | None = None
    """A LocalQueue of Kueue, which then decides when the job starts."""
    priority_class: DnsName | None = None
    """The PriorityClass of the pods: which pods start first when resources are short."""
    image_pull_secret: DnsName | None = None
    """The Secret for pulling the image."""
    image_pull_secrets: tuple[DnsName, ...] = Field(default=(), strict=False)
    """More Secrets for pulling images; each registry is asked with those that fit it."""
    env: dict[Variable, str] = Field(default={})
    """Additional environment variables."""
    env_from: dict[Variable, VariableSpec] = Field(default={})
    """Environment variables by name, each with the key of a Secret or ConfigMap that holds it."""
    mounts: tuple[MountSpec, ...] = Field(default=(), strict=False)
    """Additional volumes: data sets, certificates, credentials."""
    wandb_secret: DnsName = "wandb"
    """The Secret whose `api-key` is the API key of W&B; without it, W&B is offline."""
    s3_secret: DnsName | None = None
    """The Secret whose `credentials` is a credentials file of AWS, also for other S3 stores."""
    gcs_secret: DnsName | None = None
    """The Secret whose `key.json` is the key of a service account of Google Cloud Storage."""
    egress: tuple[str, ...] = Field(default=(), strict=False)
    """Address blocks that the pods may connect to, besides each other and DNS: 10.1.2.0/24."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Failures of one node, caused by that node, after which the job fails."""
    grace_seconds: Annotated[int, Field(ge=30)] = 180
    """Time for a pod to save its state before it is killed."""
    deadline_seconds: Annotated[int, Field(ge=1)] = 604_800
    """The job fails when it runs longer than this."""
    keep_seconds: Annotated[int, Field(ge=0)] = 86_400
    """How long a finished Job object is kept for inspection; the runs stay."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Port of the rendezvous on node 0."""
    meeting_seconds: Annotated[int, Field(ge=1)] = 600
    """How long a node waits at the rendezvous for the others before it restarts."""

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def pull_secrets(self) -> tuple[str, ...]:
        """The Secrets for pulling images, each once."""
        first = (self.image_pull_secret,) if self.image_pull_secret else ()
        return tuple(dict.fromkeys((*first, *self.image_pull_secrets)))

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
    def _each_variable_once(self) -> Self:
        for name in self.env_from:
            if name in self.env:
                raise wrong(f"must set {name} in env or in env_from, but has it in both")
        return self

    @model_validator(mode="after")
    def _memory_holds_what_is_shared(self) -> Self:
        if quantity(self.shared_memory) >= quantity(self.memory):
            raise wrong(
                f"memory must be more than shared_memory ({self.shared_memory}), which is a part "
                f"of it, but is {self.memory}"
            )
        return self


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number: bytes of a size, cores of a cpu."""
    number = text.rstrip("mkMGTi")
    unit = text.removeprefix(number)
    powers = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * (powers | binary)[unit]
