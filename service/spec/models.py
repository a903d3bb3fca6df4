"""The spec: the user's settings, as frozen and strict models. `files` reads one from a file.

No torch here: a spec is read, validated and printed on machines without it.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from service.spec.kubernetes import KubernetesSpec
from service.spec.optimizer import Optimizers, TurnSpec, in_lower_case
from service.spec.part import RUN_NAME, RUN_NAME_LETTERS, TEST_MEASURE, Part, tag_by_name, wrong
from service.spec.schedule import ConstantSpec, Schedules, ScheduleSpec, constant_unless_named
from service.spec.slurm import SlurmSpec


class BatchSpec(Part):
    """The rows of one optimizer step, and the rows of one forward pass."""

    global_batch: Annotated[int, Field(ge=1)] | Literal["all"] = Field(examples=[128])
    """Rows of one optimizer step over all processes; `all` is the whole data set (full-batch)."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows of one forward pass. It changes the arithmetic, so it is part of the experiment; the
    number of processes only decides which process computes which micro-batch. `auto`: the most
    rows that fit in memory when the run first starts. Default: 32, or less if the global batch is
    smaller; on a GPU, unless `exactness` is `bitwise`, the global batch divided by the processes
    with which the run first starts. The run's spec.yaml records the number for later attempts."""

    @model_validator(mode="after")
    def _pieces_of_the_whole(self) -> Self:
        micro_batch = self.micro_batch if isinstance(self.micro_batch, int) else 0
        if isinstance(self.global_batch, int) and micro_batch > self.global_batch:
            raise wrong(
                f"micro_batch must be at most global_batch ({self.global_batch}), "
                f"but is {self.micro_batch}"
            )
        return self


class LengthSpec(Part):
    """How long to train: set `epochs` or `steps`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; may be a fraction."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            if self.steps is None:
                raise wrong("must have epochs or steps, but has neither")
            raise wrong(
                "must have epochs or steps, but has both; clear one, such as by length.epochs="
            )
        return self


class ActivationCheckpointingSpec(Part):
    """Modules that recompute their activations in the backward pass, to use less memory."""

    match: Annotated[str, Field(min_length=1, examples=["blocks.*"])]
    """A glob over the names of modules, such as `blocks.*`. Of nested modules the outermost is
    chosen. The result has the same bits as without."""


class CompileSpec(Part):
    """How torch.compile compiles the model. Every key has the meaning that it has there."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """`reduce-overhead` replays each pass as a CUDA graph: for steps of a few milliseconds, most of
    which the host needs to launch kernels. `max-autotune-no-cudagraphs` chooses kernels by timing,
    so another attempt may round differently; `max-autotune` does both."""
    dynamic: bool | None = None
    """Kernels for any shape (`true`), or for each shape (`false`). Default: for each, until a
    second shape is met."""
    fullgraph: bool = False
    """Refuse a model of which torch cannot make one graph."""
    backend: Annotated[str, Field(pattern=r"^\w+$")] = "inductor"
    """A backend of torch.compile, such as `aot_eager` to look for the cause of a fault. A `mode`
    other than `default` belongs to `inductor`."""

    @model_validator(mode="after")
    def _mode_of_inductor(self) -> Self:
        if self.mode != "default" and self.backend != "inductor":
            raise wrong(
                f"mode: {self.mode} belongs to the backend inductor, but backend is "
                f"{self.backend}; leave one of them out"
            )
        return self

    @property
    def replays(self) -> bool:
        """Whether passes are replayed as CUDA graphs, each of which has its own memory."""
        return self.mode in ("reduce-overhead", "max-autotune") or self.backend == "cudagraphs"

    @property
    def in_words(self) -> str:
        """The key that asks for CUDA graphs."""
        if self.backend != "inductor":
            return f"model.compile.backend: {self.backend}"
        return f"model.compile.mode: {self.mode}"


def _switch_or_options(value: Any) -> str:
    return "options" if isinstance(value, dict | CompileSpec) else "switch"


class ModelSpec(Part):
    """How the model is computed."""

    batchnorm: Literal["micro", "sync", "local"] = "micro"
    """`micro`: statistics of each micro-batch, running statistics equal at every number of
    processes. `sync`: statistics over all processes. `local`: each process keeps its own."""
    buffers: Literal["mean", "sum", "first", "local"] = "mean"
    """New value, after a step, of the buffers (except BatchNorm's) that the forward pass changes:
    the `mean` over the step's micro-batches, the old value plus the `sum` of their changes, or the
    value after its `first` micro-batch. `local`: each process keeps its own."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of the forward and backward pass; weights keep the dtype that the model gave."""
    compile: Annotated[
        Annotated[bool, Tag("switch")] | Annotated[CompileSpec, Tag("options")],
        Discriminator(_switch_or_options),
    ] = False
    """Compile the model with torch.compile; of a sharded model, each unit by itself. `true`, or its
    options."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its convolution algorithms and use the fastest. Another attempt may measure
    other times and round differently, so a resumed run may not end with the same bits."""
    channels_last: bool = False
    """Store images as NHWC, which is faster for convolutions on recent GPUs."""
    moving_average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999."""
    activation_checkpointing: ActivationCheckpointingSpec | None = None
    """Recompute activations in the backward pass instead of storing them."""

    @property
    def compilation(self) -> CompileSpec | None:
        """How the model is compiled; None if it is not."""
        return CompileSpec() if self.compile is True else self.compile or None


class _InitSpec(Part):
    """Initial weights from another source, instead of random ones."""

    checkpoint: str = "latest"
    """With a run: `latest`, `best`, or a step."""
    average: bool = False
    """With a run: load the moving average of its weights."""
    rename: dict[str, str] = Field(default={})
    """Maps names of tensors and modules in the source to names in the model; `.` stands for all of
    the source, which is put into a module of the model."""
    skip: tuple[str, ...] = Field(default=(), strict=False)
    """Globs over names, of the model or of the source, that are not loaded, such as `head.*`."""
    strict: bool = True
    """Whether everything that is not skipped must match. `false`: load what matches."""

    @property
    def source(self) -> str:
        """The value of `from`, which is a keyword in Python."""
        return str(getattr(self, "from"))


if TYPE_CHECKING:
    InitSpec = _InitSpec
else:
    _from = Field(
        description="A run, a .safetensors file, or a directory of a transformers model.",
        examples=["digits"],
    )
    InitSpec = create_model(
        "InitSpec", __base__=_InitSpec, __doc__=_InitSpec.__doc__, **{"from": (str, _from)}
    )


class TestSpec(Part):
    """When and how the test loop runs; it always runs at the end."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two tests."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    micro_batch: Annotated[int, Field(ge=1)] = 256
    """Rows of one forward pass of the test loop."""
    at_start: bool = False
    """Test before the first step too, so that a failing measure is found within seconds. This test
    affects neither the best checkpoint nor early stopping."""

    _one_interval = model_validator(mode="after")(lambda self: _at_most_one_interval(self))


class BestSpec(Part):
    """The test measure that determines the best checkpoint."""

    measure: Annotated[str, Field(pattern=TEST_MEASURE, examples=["test/accuracy"])]
    """A key of the metrics, such as `test/accuracy`."""
    mode: Annotated[Literal["max", "min"], Field(examples=["max"])]
    """Whether a larger (`max`) or a smaller (`min`) value is better."""


class EarlyStoppingSpec(BestSpec):
    """Ends the run as done when a test measure stops improving."""

    patience: Annotated[int, Field(ge=1, examples=[5])]
    """Consecutive tests without improvement before the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement, in the unit of the measure."""


class CheckpointSpec(Part):
    """When a checkpoint is written; one is always written at the end and when stopped."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between two checkpoints."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    keep: Annotated[int, Field(ge=1)] = 3
    """How many of the newest to keep; the best ones are kept in addition."""
    keep_best: Annotated[int, Field(ge=1)] = 1
    """How many of the best to keep, by the measure of `best`."""
    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """In addition, never delete the first checkpoint at or after every multiple of this step."""
    best: BestSpec | None = None
    """The measure that determines the best checkpoints; they are kept besides the newest ones."""
    rename: dict[str, str] = Field(default={})
    """Maps old names of parameters and modules to their names in the model now."""
    asynchronous: bool = True
    """Training pauses only while the state is copied; a background thread writes the copy. The
    first node needs main memory for one more copy of the weights and optimizer state."""
    on_failure: Literal["stop", "go_on"] = "stop"
    """What to do when a checkpoint cannot be written, such as on a full disk. The last
    checkpoint of a run must succeed in both cases."""

    _one_interval = model_validator(mode="after")(lambda self: _at_most_one_interval(self))

    @model_validator(mode="after")
    def _best_of_something(self) -> CheckpointSpec:
        if self.keep_best > 1 and self.best is None:
            raise wrong(
                "must have best, whose measure determines the best checkpoints, for keep_best"
            )
        return self


def _at_most_one_interval(part: TestSpec | CheckpointSpec) -> TestSpec | CheckpointSpec:
    if part.every_steps is not None and part.every_epochs is not None:
        raise wrong("must have every_steps or every_epochs, but has both")
    return part


class ExchangeSpec(Part):
    """How several processes sum their gradients; not used by a single process."""

    mode: Literal["ddp", "sharded", "hybrid"] = "ddp"
    """`ddp`: every process has the whole model, its gradients and the optimizer state.
    `sharded`: each has some rows of every parameter (FSDP2), for a model that does not fit.
    `hybrid`: the rows are divided among the processes of a node, and each node has all of them
    (HSDP), so that parameters are not sent between nodes."""
    units: tuple[str, ...] = Field(default=(), strict=False, examples=[["blocks.*"]])
    """With `sharded`: globs over the names of the modules whose parameters are gathered together.
    Default: the repeated blocks in the model's lists of modules. The rest is one more unit."""
    reshard_after_forward: bool = True
    """With `sharded`: release the parameters of a unit after its forward pass and gather them
    again for its backward pass. `false` sends a third less, and keeps all of them in between."""
    sync_each_micro_batch: bool = False
    """With `sharded`: sum gradients over the processes after every micro-batch, not only with the
    last of a step. A process with several micro-batches then never has the gradients of the whole
    model in memory, but gradients are sent with each of them."""
    offload: bool = False
    """With `sharded` on GPUs: keep each process's rows of weights, gradients and optimizer state in
    main memory, where the optimizer computes its updates. The device then holds only the units that
    are gathered. Rows are copied to the device in every pass, and gradients from it in every
    step."""
    return_memory: bool = True
    """With `sharded` on CPUs: return freed activations and gradients to the system when the process
    has become larger than it has to be. `false` keeps them: a step is faster, and needs more
    memory."""

    @property
    def shards(self) -> bool:
        """Whether a process has only some rows of each parameter."""
        return self.mode != "ddp"

    precision: Literal["full", "bf16"] = "full"
    """Number format in which gradients are sent. `bf16` halves the bytes and rounds each gradient
    and sum to 8 bits, so the result then depends on the number of processes."""
    bucket_mib: Annotated[int, Field(ge=1)] = 25
    """MiB of gradients in one message. A message is sent during the backward pass, when full."""
    static_graph: bool = False
    """Promise that every step trains the same parameters in the same order, so that DDP need not
    search for unused parameters in each step."""


class LoaderSpec(Part):
    """How rows are read."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """Worker processes for each training process; with 0 the training process reads the rows.
    `auto`: the container's cores for each training process, minus the one that trains. Default:
    0 on a CPU; on a GPU as `auto`, if half of /dev/shm is enough for the rows they read ahead."""
    stream: Literal["whole", "split"] = "whole"
    """For iterable data. `whole`: every process reads all rows, and the result does not depend on
    the number of processes. `split`: each process reads its part, and the result depends on it."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Steps that each worker reads ahead."""
    in_memory: bool = False
    """Read every row once, at the start, and keep all rows in memory. For rows that fit into
    memory and are the same each time they are read."""


class WandBSpec(Part):
    """The Weights & Biases run."""

    project: Annotated[str, Field(examples=["digits"])]
    """The project of the run."""
    entity: str | None = None
    """The user or team that owns the project. Default: the entity of the API key."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online if an API key is set, and offline otherwise."""
    group: str | None = None
    """Runs with the same group are shown together."""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    """Tags of the run, to filter by."""
    finish_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the end of a run may wait for W&B to receive the remaining rows."""
    artifacts: Literal["none", "reference"] = "none"
    """`reference`: at the end, record the paths of the newest and the best checkpoint. The
    checkpoints are not uploaded or copied."""


class TrackioSpec(Part):
    """The trackio run."""

    project: Annotated[str, Field(examples=["digits"])]
    """The project of the run."""
    space: str | None = None
    """A Hugging Face Space, as `user/name`. Default: stored on this machine, for `trackio show`."""


class MLflowSpec(Part):
    """Where MLflow shows the run."""

    experiment: Annotated[str, Field(min_length=1, max_length=500, examples=["digits"])]
    """The experiment the run belongs to."""
    uri: Annotated[str, Field(examples=["http://mlflow.example.com:5000"])] | None = None
    """The tracking server. Default: MLFLOW_TRACKING_URI, or a local database."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise wrong(
                "must have no password, which everybody who can read the run would see: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return uri


class OpenTelemetrySpec(Part):
    """Where the metrics of a launcher are sent by OpenTelemetry's protocol, OTLP over HTTP."""

    endpoint: Annotated[str, Field(examples=["http://collector:4318"])] | None = None
    """The address of the receiver; `/v1/metrics` is added. Default: what OpenTelemetry's own
    variables name (OTEL_EXPORTER_OTLP_ENDPOINT), or http://localhost:4318."""
    every_seconds: Annotated[float, Field(ge=1, le=3600)] = 15.0
    """Time between two messages."""

    @field_validator("endpoint")
    @classmethod
    def _of_http(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise wrong(
                f"must be an address such as http://collector:4318, but is {endpoint!r}: OTLP is "
                "sent over HTTP"
            )
        if "@" in parts.netloc:
            raise wrong(
                "must have no password, which everybody who can read the run would see: set "
                "OTEL_EXPORTER_OTLP_HEADERS"
            )
        return endpoint


def _an_address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError as error:
        raise wrong(f"must be an address such as 127.0.0.1 or 0.0.0.0, but is {text!r}") from error


IpAddress = Annotated[str, AfterValidator(_an_address)]


class TrackingSpec(Part):
    """What is logged and how often."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between two rows of metrics.jsonl."""
    wandb: WandBSpec | None = None
    """Also log to Weights & Biases."""
    tensorboard: bool = False
    """Also write a TensorBoard event file, in the run's directory."""
    trackio: TrackioSpec | None = None
    """Also log to trackio."""
    mlflow: MLflowSpec | None = None
    """Also log to MLflow."""
    metrics_port: Annotated[int, Field(ge=1024, le=65535, examples=[9400])] | None = None
    """Port of an endpoint for Prometheus on each launcher: /metrics (OpenMetrics) and /healthz."""
    metrics_address: IpAddress = "127.0.0.1"
    """The address on which it listens besides loopback; 0.0.0.0 is every address. The pods of a
    rendered job use that of the pod."""
    opentelemetry: OpenTelemetrySpec | None = None
    """Also send these metrics to an OpenTelemetry collector."""


class FaultsSpec(Part):
    """Timeouts, requests to stop, and failures."""

    hang_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A process that makes no progress for this long is reported and killed."""
    startup_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """The same limit before the first step, when data are loaded and the model is compiled."""
    hook_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """The same limit for one call of a hook of the task, which is then interrupted and fails."""
    on_hook_failure: Literal["go_on", "stop"] = "go_on"
    """What to do when a hook of the task fails: report it, or save and end the run."""
    stop_poll_steps: Annotated[int, Field(ge=1)] = 50
    """Maximum number of steps between two joint checks of all processes for a request to stop."""
    stop_budget_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Time for a requested stop, including the last save; after it the launcher kills the
    processes. `auto`: 120 s, or more if the saves of this run take longer."""
    attempts_without_progress: Annotated[int, Field(ge=1)] = 3
    """Consecutive failures without a new checkpoint after which the run ends with exit code 42."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: end the run, or skip the step."""
    skips_allowed: Annotated[int, Field(ge=0)] = 10
    """With `skip`: how many steps of the run may be skipped before it ends."""


# They treat each element of a parameter separately, so rows can be treated separately.
BY_NUMBER = (
    "sgd",
    "adam",
    "adamw",
    "adagrad",
    "adadelta",
    "adamax",
    "nadam",
    "radam",
    "rmsprop",
)


def _one_or_several(schema: dict[str, Any]) -> None:
    """Let an editor require one of the sections `optimizer` and `optimizers`; neither is null."""
    optimizer = schema["properties"]["optimizer"]
    [chosen, _] = optimizer.pop("anyOf")
    optimizer |= chosen
    schema["required"].remove("optimizer")
    schema["anyOf"] = [{"required": ["optimizer"]}, {"required": ["optimizers"]}]


def _not_in_turns(spec: Spec) -> list[tuple[bool, str, str]]:
    """(whether the spec asks for it, what, what to do instead), for a spec with `optimizers`."""
    return [
        (spec.schedule != ConstantSpec(), "schedule", "each of them has its own schedule"),
    ]


ONLY_SHARDED = (
    "units",
    "reshard_after_forward",
    "sync_each_micro_batch",
    "offload",
    "return_memory",
)
"""Keys of the section exchange that other modes do not have."""


def _not_replayed(spec: Spec) -> list[tuple[bool, str]]:
    """(whether the spec asks for it, why and what to do) for all that no CUDA graph can do."""
    return [
        (
            spec.exchange.shards,
            f"exchange.mode: {spec.exchange.mode}, which gathers parameters at other addresses in "
            "each pass: use mode: default",
        ),
        (
            bool(spec.optimizers),
            "optimizers, whose step may keep outputs of a model: use mode: default",
        ),
        (
            spec.model.batchnorm == "sync",
            "model.batchnorm: sync, which sends within a pass: use micro",
        ),
        (
            spec.batch.micro_batch == "auto",
            "batch.micro_batch: auto, which measures passes without the memory of the graphs: give "
            "a number",
        ),
    ]


def _not_sharded(spec: Spec) -> list[tuple[bool, str, str]]:
    """(whether the spec asks for it, what, what to do instead) for everything not yet sharded."""
    model, exchange = spec.model, spec.exchange
    named = {f"optimizers.{n}.optimizer.name": t.optimizer for n, t in spec.optimizers.items()}
    if spec.optimizer is not None:
        named = {"optimizer.name": spec.optimizer}
    known = f"use one of {', '.join(BY_NUMBER)}"
    return [
        *((o.name not in BY_NUMBER, f"{key}: {o.name}", known) for key, o in named.items()),
        (model.channels_last, "model.channels_last", "leave it out"),
        (model.batchnorm == "local", "model.batchnorm: local", "use micro or sync"),
        (model.buffers == "local", "model.buffers: local", "use mean, sum or first"),
        (exchange.precision != "full", "exchange.precision: bf16", "leave it out"),
        (
            exchange.bucket_mib != 25,
            "exchange.bucket_mib",
            "leave it out; parameters are gathered by units",
        ),
        (exchange.static_graph, "exchange.static_graph", "leave it out"),
    ]


class Spec(Part):
    """A training job."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=RUN_NAME_LETTERS, examples=["digits"])]
    """Name of the run and of its directory."""
    task: Annotated[str, Field(examples=["./my_task.py:task"])]
    """The task, as `package.module:name` or `./file.py:name`."""
    task_args: dict[str, Any] = Field(default={})
    """Arguments of the task, if it is a function. A text that begins with `./` or `../` is a path
    relative to the spec's directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all random numbers of the run."""
    exactness: Literal["rounding", "bitwise"] = "rounding"
    """How equal the results are at different numbers of processes: up to rounding, or bit for
    bit. `bitwise` computes each micro-batch separately and sums in a fixed order, at 1, 2, 4, 8,
    ... processes."""
    batch: BatchSpec = Field(examples=[{"global_batch": 128}])
    """The rows of one optimizer step, and the rows of one forward pass."""
    length: LengthSpec = Field(examples=[{"epochs": 10}])
    """How long to train."""
    model: ModelSpec = ModelSpec()
    """How the model is computed."""
    init: InitSpec | None = None
    """Initial weights from another source, instead of random ones."""
    optimizer: Annotated[Optimizers, Discriminator(tag_by_name)] | None = Field(
        examples=[{"name": "sgd", "lr": 0.1}]
    )
    """The optimizer and its options."""
    optimizers: dict[str, TurnSpec] = Field(default={})
    """Several optimizers by name, instead of `optimizer` and `schedule`. In every step they take
    turns in this order. For a task with its own step."""
    schedule: Annotated[Schedules, Discriminator(tag_by_name)] = ConstantSpec()
    """Multiplier of the learning rate during the run."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down if their norm over all parameters is larger than this."""
    max_grad_value: Annotated[float, Field(gt=0)] | None = None
    """Each element of a gradient is clipped to [-this, this], before `max_grad_norm`."""
    test: TestSpec = TestSpec()
    """When and how the test loop runs."""
    early_stopping: EarlyStoppingSpec | None = None
    """End the run when a test measure stops improving."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When a checkpoint is written, and how many are kept."""
    loader: LoaderSpec = LoaderSpec()
    """How rows are read."""
    exchange: ExchangeSpec = ExchangeSpec()
    """How several processes sum their gradients."""
    tracking: TrackingSpec = TrackingSpec()
    """What is logged and how often."""
    faults: FaultsSpec = FaultsSpec()
    """Timeouts, requests to stop, and failures."""
    kubernetes: KubernetesSpec | None = None
    """How the job runs on a Kubernetes cluster."""
    slurm: SlurmSpec | None = None
    """How the job runs on a Slurm cluster."""

    model_config = ConfigDict(json_schema_extra=_one_or_several)

    _any_case = field_validator("optimizer", mode="before")(in_lower_case)
    _constant = field_validator("schedule", mode="before")(constant_unless_named)

    @model_validator(mode="before")
    @classmethod
    def _several_without_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("optimizers") and "optimizer" not in values:
            return {**values, "optimizer": None}
        return values

    @field_validator("optimizers")
    @classmethod
    def _have_names(cls, optimizers: dict[str, TurnSpec]) -> dict[str, TurnSpec]:
        for name in optimizers:
            if not name.isidentifier():
                raise wrong(f"a name must be letters, digits and _, but one is {name!r}")
        if optimizers and all(turn.every > 1 for turn in optimizers.values()):
            least = min(turn.every for turn in optimizers.values())
            raise wrong(
                f"one of them must step in every step, but the smallest `every` is {least}: divide "
                f"all "
                "by their common factor, because a step without an optimizer trains nothing"
            )
        return optimizers

    @model_validator(mode="after")
    def _by_one_or_several(self) -> Self:
        if (self.optimizer is None) == (not self.optimizers):
            has = "both; remove one" if self.optimizers else "neither"
            raise wrong(f"must have optimizer or optimizers, but has {has}")
        for is_so, what, instead in _not_in_turns(self) if self.optimizers else ():
            if is_so:
                raise wrong(f"optimizers do not work with {what} yet: {instead}")
        return self

    @property
    def schedules(self) -> dict[str, ScheduleSpec]:
        """Every schedule of a learning rate, by its key."""
        if not self.optimizers:
            return {"schedule": self.schedule}
        return {f"optimizers.{n}.schedule": turn.schedule for n, turn in self.optimizers.items()}

    @model_validator(mode="after")
    def _whole_to_the_bit(self) -> Self:
        if self.exactness == "bitwise" and self.exchange != ExchangeSpec():
            raise wrong(
                "exactness: bitwise sums gradients in its own fixed order: "
                "remove the section exchange"
            )
        return self

    @model_validator(mode="after")
    def _not_chosen_by_time(self) -> Self:
        if self.exactness == "bitwise" and self.model.cudnn_benchmark:
            raise wrong(
                "exactness: bitwise needs the same algorithms in every attempt: "
                "remove model.cudnn_benchmark"
            )
        return self

    @model_validator(mode="after")
    def _can_be_compiled_so(self) -> Self:
        how = self.model.compilation or CompileSpec()
        if self.exactness == "bitwise" and (how.mode != "default" or how.replays):
            raise wrong(
                "exactness: bitwise needs the same kernels in every process and attempt, which "
                f"{how.in_words} does not promise: use mode: default"
            )
        for is_so, why in _not_replayed(self) if how.replays else ():
            if is_so:
                raise wrong(f"{how.in_words} makes CUDA graphs, which do not work with {why}")
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.exchange.mode == "ddp":
            for key in ONLY_SHARDED:
                if getattr(self.exchange, key) != getattr(ExchangeSpec(), key):
                    raise wrong(f"exchange.{key} needs exchange.mode: sharded or hybrid")
            return self
        for is_so, what, instead in _not_sharded(self):
            if is_so:
                mode = self.exchange.mode
                raise wrong(f"exchange.mode: {mode} does not work with {what} yet: {instead}")
        return self

    @model_validator(mode="after")
    def _tests_in_time(self) -> Self:
        waiting = "early_stopping" if self.early_stopping else None
        if any(schedule.name == "plateau" for schedule in self.schedules.values()):
            waiting = waiting or "schedule plateau"
        if waiting and self.test.every_steps is None and self.test.every_epochs is None:
            raise wrong(f"{waiting} needs tests: add test.every_epochs or test.every_steps")
        return self

    @field_validator("task")
    @classmethod
    def _names_a_task(cls, task: str) -> str:
        where, _, name = task.rpartition(":")
        is_file, is_module = where.endswith(".py"), all(map(str.isidentifier, where.split(".")))
        if not (name.isidentifier() and (is_file or is_module)):
            raise wrong(f"must be package.module:name or ./file.py:name, but is {task!r}")
        return task
