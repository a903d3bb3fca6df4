"""The section `kubernetes:`: where a job runs on a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_network
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from service.spec.part import (
    ABSOLUTE_PATH,
    ADDRESS,
    CAPABILITY,
    DATA_KEY,
    DEVICE,
    DNS_LABEL,
    DNS_NAME,
    HUGE_PAGE,
    IMAGE,
    LABEL,
    LABEL_VALUE,
    QUANTITY,
    RELATIVE_PATH,
    RESOURCE,
    VARIABLE,
    Part,
    wrong,
)

Quantity = Annotated[str, Field(pattern=QUANTITY)]
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
DnsName = Annotated[str, Field(pattern=DNS_NAME)]
Variable = Annotated[str, Field(pattern=VARIABLE)]
LabelKey = Annotated[str, Field(pattern=LABEL)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE)]
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


Loosening = Literal[
    "apparmor",
    "capabilities",
    "host_ipc",
    "host_network",
    "host_pid",
    "host_ports",
    "privilege_escalation",
    "privileged",
    "probe_hosts",
    "proc_mount",
    "root",
    "seccomp",
    "selinux",
    "service_account_token",
    "sysctls",
    "volumes",
    "writable_root",
]
"""The possible exceptions to the security of a pod, by name."""


class SpreadSpec(Part):
    """A rule by which the pods are spread over the cluster's nodes."""

    key: Annotated[str, Field(pattern=LABEL, examples=["kubernetes.io/hostname"])]
    """The label whose values are the groups of nodes."""
    max_skew: Annotated[int, Field(ge=1)] = 1
    """Most pods that one group may have more than another."""
    required: bool = False
    """Whether a pod waits if the rule would be violated, or is placed anyway."""


class LoosenedSecuritySpec(Part):
    """Exceptions to Pod Security `restricted`; nothing else weakens it."""

    host_network: bool = False
    """Use the network of the node; NetworkPolicies do not apply to it."""
    root: bool = False
    """Run as uid 0."""
    capabilities: tuple[Annotated[str, Field(pattern=CAPABILITY)], ...] = Field(
        default=(), strict=False
    )
    """Capabilities to add, such as IPC_LOCK; they need `root`."""
    pod_template: tuple[Loosening, ...] = Field(default=(), strict=False)
    """What `pod_template` may loosen, such as `volumes` for a hostPath."""

    @model_validator(mode="after")
    def _capabilities_take_effect(self) -> Self:
        if self.capabilities and not self.root:
            raise wrong(
                f"must have root: true for {', '.join(self.capabilities)}, because Kubernetes "
                f"gives "
                "an added capability to no other user; without root, raise the limit on the node "
                "(for IPC_LOCK: memlock of the container runtime) and leave it out"
            )
        return self


class VariableSpec(Part):
    """The source of an environment variable: a key of a Secret or of a ConfigMap."""

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


class NodesSpec(Part):
    """The nodes of an elastic job: it continues with those that are there."""

    least: Annotated[int, Field(ge=1)]
    """With fewer pods the job waits."""
    most: Annotated[int, Field(ge=2)]
    """Pods that are asked for."""
    wait_seconds: Annotated[int, Field(ge=1)] = 30
    """How long the pods that are there wait for more before they begin."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least >= self.most:
            raise wrong(
                f"must have least below most, but has {self.least} and {self.most}; for a fixed "
                f"number write nodes: {self.most}"
            )
        return self


def _number_or_range(given: Any) -> str:
    return "range" if isinstance(given, Mapping | NodesSpec) else "number"


Nodes = Annotated[Annotated[int, Field(ge=1)], Tag("number")] | Annotated[NodesSpec, Tag("range")]

OWN_LABELS = tuple(
    f"app.kubernetes.io/{key}" for key in ("name", "instance", "component", "managed-by")
)
"""The labels by which the objects of a run are found."""


class KubernetesSpec(Part):
    """How the job runs on a Kubernetes cluster; it never changes the result."""

    image: Annotated[
        str, Field(pattern=IMAGE, examples=["registry.example.com/team/evenstep:0.1.0"])
    ]
    """The container image, preferably with its digest."""
    nodes: Annotated[Nodes, Discriminator(_number_or_range)] = 1
    """Pods that train together. With `least` and `most`, the job continues with those that are
    there."""
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
    runs: Annotated[str, Field(pattern=ADDRESS, examples=["s3://bucket/runs"])] | None = None
    """Keep the runs at this address in object storage, without any claim."""
    storage_claim: DnsName | None = None
    """An existing PersistentVolumeClaim for the runs. Default: a new one is created."""
    storage: Quantity = "50Gi"
    """Size of the new claim."""
    storage_class: DnsName | None = None
    """Storage class of the new claim; with several nodes it must support ReadWriteMany."""
    namespace: DnsLabel | None = None
    """The namespace. Default: the one of the current kubectl context."""
    resources: dict[Annotated[str, Field(pattern=RESOURCE)], Annotated[int, Field(ge=1)]] = Field(
        default={}
    )
    """Other devices of each pod by the cluster's name, such as `vpc.amazonaws.com/efa: 4`."""
    hugepages: dict[Annotated[str, Field(pattern=HUGE_PAGE)], Quantity] = Field(default={})
    """Huge pages of each pod by size, such as `2Mi: 5Gi`; not a part of `memory`."""
    fabric: Literal["infiniband", "efa", "tcp"] | None = None
    """Variables that restrict NCCL to this network between nodes. Default: NCCL chooses."""
    node_selector: dict[LabelKey, LabelValue] = Field(default={})
    """Labels that the cluster's nodes must have."""
    tolerations: tuple[TolerationSpec, ...] = Field(default=(), strict=False)
    """Taints that the pods tolerate, in addition to the taint of the devices."""
    topology: Annotated[str, Field(pattern=LABEL)] = "topology.kubernetes.io/zone"
    """Pods prefer nodes that share the value of this label; `none` for no preference."""
    topology_spread: tuple[SpreadSpec, ...] = Field(default=(), strict=False)
    """Rules that spread the pods, such as one pod per node."""
    runtime_class: DnsName | None = None
    """The RuntimeClass of the pods. Default: the cluster's default."""
    scheduler: DnsName | None = None
    """The scheduler of the pods. Default: that of `gang`, or the cluster's default."""
    gang: Literal["volcano", "coscheduling"] | None = None
    """Start all pods or none, with a PodGroup of Volcano or of the coscheduling plugin."""
    gang_queue: DnsName | None = None
    """The Volcano queue."""
    exclusive_topology: LabelKey | None = None
    """Give the job all nodes with one value of this label exclusively (JobSet)."""
    queue: DnsLabel | None = None
    """A Kueue LocalQueue, which then decides when the job starts."""
    queue_priority: DnsName | None = None
    """A Kueue WorkloadPriorityClass: the job's priority in the queue, and for preemption."""
    queue_topology_required: LabelKey | None = None
    """Kueue places all pods on nodes with one value of this label, or lets the job wait."""
    queue_topology_preferred: LabelKey | None = None
    """Kueue places all pods on nodes with one value of this label if possible."""
    priority_class: DnsName | None = None
    """The PriorityClass of the pods: which pods start first when resources are short."""
    image_pull_secret: DnsName | None = None
    """The Secret for pulling the image."""
    image_pull_secrets: tuple[DnsName, ...] = Field(default=(), strict=False)
    """More Secrets for pulling images; each registry gets those that match it."""
    labels: dict[LabelKey, LabelValue] = Field(default={})
    """Additional labels of every object and of the pods."""
    annotations: dict[LabelKey, str] = Field(default={})
    """Additional annotations of the pods, such as the networks of Multus."""
    service_account: DnsName | None = None
    """An existing ServiceAccount, such as one with a cloud identity. Default: a new one."""
    service_account_annotations: dict[LabelKey, str] = Field(default={})
    """Annotations of the new ServiceAccount, which give it a cloud identity, such as
    `eks.amazonaws.com/role-arn`."""
    user: Annotated[int, Field(ge=1, le=2**31 - 1)] = 10001
    """The uid and gid of the pods' processes, and the group of their volumes."""
    supplemental_groups: tuple[Annotated[int, Field(ge=1, le=2**31 - 1)], ...] = Field(
        default=(), strict=False
    )
    """Additional gids of the processes, such as the group of a shared storage or of a device."""
    pod_template: dict[str, Any] = Field(default={})
    """Fields of Kubernetes' own pod template, merged into the rendered one; `null` removes one."""
    loosened_security: LoosenedSecuritySpec = Field(default=LoosenedSecuritySpec())
    """Exceptions to Pod Security `restricted`. Default: none."""
    env: dict[Variable, str] = Field(default={})
    """Additional environment variables. Values are literal: `$(NAME)` stays as it is."""
    env_from: dict[Variable, VariableSpec] = Field(default={})
    """Environment variables by name, each with the key of a Secret or ConfigMap."""
    mounts: tuple[MountSpec, ...] = Field(default=(), strict=False)
    """Additional volumes: data sets, certificates, credentials."""
    wandb_secret: DnsName = "wandb"
    """The Secret whose key `api-key` is the API key of W&B; without it, W&B is offline."""
    s3_secret: DnsName | None = None
    """The Secret whose key `credentials` is an AWS credentials file, also for other S3 stores."""
    gcs_secret: DnsName | None = None
    """The Secret whose key `key.json` is the key of a Google Cloud service account."""
    egress: tuple[str, ...] = Field(default=(), strict=False)
    """Address blocks to which the pods may connect, besides each other and DNS: 10.1.2.0/24."""
    scrape_from: dict[LabelKey, LabelValue] = Field(default={})
    """Labels of the namespaces whose pods may read the metrics at `tracking.metrics_port`, such as
    `kubernetes.io/metadata.name: monitoring`. Default: none may."""
    liveness_probe: bool = False
    """Restart a pod in which the hang watch of a process has stopped, by /healthz at
    `tracking.metrics_port`. Long saves, tests and starts are healthy."""
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
    def most_nodes(self) -> int:
        """The largest number of pods."""
        return self.nodes.most if isinstance(self.nodes, NodesSpec) else self.nodes

    @property
    def least_nodes(self) -> int:
        """The smallest number of pods with which the job trains."""
        return self.nodes.least if isinstance(self.nodes, NodesSpec) else self.nodes

    @property
    def is_elastic(self) -> bool:
        """Whether the number of pods may change."""
        return isinstance(self.nodes, NodesSpec)

    @property
    def on_cpu(self) -> bool:
        """Whether the pods train on the CPU."""
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
                # Not 10.0.0.0/255.0.0.0, which Python accepts too.
                if re.fullmatch(r".*/[0-9]+", block) and ip_network(block):
                    continue
            except ValueError as error:
                raise wrong(f"must be address blocks, but {error}") from error
            near = block.partition("/")[0]
            raise wrong(f"must be address blocks, such as {near}/32, but has {block!r}")
        return egress

    @field_validator("env")
    @classmethod
    def _without_nul(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if "\0" in value:
                raise wrong(f"must not contain a NUL character, but {name} does")
        return env

    @field_validator("labels")
    @classmethod
    def _labels_of_ours(cls, labels: dict[str, str]) -> dict[str, str]:
        for key in labels:
            if key in OWN_LABELS:
                raise wrong(f"must not set {key}, which Evenstep uses to find its objects")
        return labels

    @field_validator("hugepages")
    @classmethod
    def _whole_pages(cls, hugepages: dict[str, str]) -> dict[str, str]:
        for page, size in hugepages.items():
            if quantity(size) == 0 or quantity(size) % quantity(page):
                raise wrong(
                    f"must be a multiple of the page size, but {size} is not a multiple of {page}"
                )
        return hugepages

    @model_validator(mode="after")
    def _devices_once(self) -> Self:
        if self.device in self.resources:
            raise wrong(f"must have {self.device} in device, and its number in processes_per_node")
        if self.fabric is not None and self.on_cpu:
            raise wrong(
                "must have a device with fabric, because on CPUs gloo exchanges data over TCP"
            )
        return self

    @model_validator(mode="after")
    def _one_place_of_runs(self) -> Self:
        for key in ("storage_claim", "storage_class", "storage"):
            if self.runs is not None and key in self.model_fields_set:
                raise wrong(f"must have one of runs and {key}: at {self.runs} there is no claim")
        if self.service_account is not None and self.service_account_annotations:
            raise wrong(
                "must have one of service_account, which exists, and service_account_annotations, "
                "which are those of a new one"
            )
        return self

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> Self:
        for key in ("queue_priority", "queue_topology_required", "queue_topology_preferred"):
            if getattr(self, key) is not None and self.queue is None:
                raise wrong(f"must have queue with {key}, which Kueue reads")
        if self.queue_topology_required and self.queue_topology_preferred:
            raise wrong("must have one of queue_topology_required and queue_topology_preferred")
        if self.gang_queue is not None and self.gang != "volcano":
            raise wrong(
                "must have gang: volcano with gang_queue; the key for a Kueue queue is queue"
            )
        return self

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
                f"memory must be more than shared_memory ({self.shared_memory}), which it "
                f"includes, "
                f"but is {self.memory}"
            )
        return self


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: bytes of a size, cores of a cpu."""
    number = text.rstrip("mkKMGTi")
    unit = text.removeprefix(number)
    powers = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * (powers | binary)[unit]
