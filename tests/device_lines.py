"""Every line of service/ and launch/ that depends on the device, and what has run it so far.

`python tests/device_lines.py` writes the table into docs/reference/devices.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "devices.md"
BEGIN, END = "<!-- written by: python tests/device_lines.py -->", "<!-- end of what it writes -->"

# A line that asks what the device is, or does something that only a device has.
ASKS = re.compile(
    r"device\.type|_on_cpu\b|\bon_cpu\b|_pinned\b|\bcopies_late\(|\bmoment\(self|\bsynchronize\("
    r"|\bforget_peak\(|\bpeak_bytes\(|\bfree_bytes\(|\bname_of\(device|\bresident_bytes\("
    r"|\bfits_on\(|= near\(|\binitializer=_begin_writing\b|\bgenerators\(self|= ready\("
    r"|device_waits\b|\bon_device\b|get_backend\(\) |torch\.accelerator|module_of\("
    r"|get_device_module|record_stream\("
)
# A line that names one vendor's device, library or tool.
VENDOR = re.compile(
    r"torch\.(cuda|xpu|mps|npu|mtia|version\.cuda)\b|\"(cuda|xpu|mps|npu)\"|nvidia-smi|cudnn(?!_benchmark)"
    r"|CUBLAS_|NCCL_|CUDA\b(?! graph)|torch/(cuda|xpu|npu)/"
)

CPU, SIM = "CPU", "CPU and simulated device"
# What ran a module's lines in `make test`, where a line of its own below does not say otherwise.
RAN = {
    "service/distributed/generators.py": SIM,
    "service/data/batches.py": SIM,
    "service/preview/check.py": SIM,
    "service/checkpoints/checkpoints.py": SIM,
    "service/checkpoints/pending_copies.py": SIM,
    "service/checkpoints/shards.py": SIM,
    "service/distributed/devices.py": SIM,
    "service/distributed/contention.py": SIM,
    "service/basics/errors.py": CPU,
    "service/training/batch_size_finder.py": SIM,
    "service/optimization/compilation.py": "CPU; CUDA graphs: nothing yet",
    "service/optimization/flops.py": SIM,
    "service/health/watchdog.py": CPU,
    "service/data/in_memory.py": SIM,
    "service/data/loading.py": SIM,
    "service/data/losses.py": SIM,
    "service/evaluation/hooks.py": SIM,
    "service/evaluation/metrics.py": SIM,
    "service/sharding/sharding.py": SIM,
    "service/distributed/batchnorm.py": "CPU; torch's own SyncBatchNorm elsewhere: nothing yet",
    "service/optimization/optimizers.py": SIM,
    "service/distributed/recursive_doubling.py": SIM,
    "service/optimization/precision.py": SIM,
    "service/in_place.py": CPU,
    "service/distributed/profiler.py": SIM,
    "service/health/heartbeat.py": SIM,
    "service/training/dry_run.py": SIM,
    "service/checkpoints/snapshots.py": SIM,
    "service/distributed/stragglers.py": SIM,
    "service/training/attempt.py": SIM,
    "service/training/setup.py": SIM,
    "service/training/worker.py": SIM,
    "launch/engines/kubernetes/pod/pods.py": CPU,
    "launch/engines/kubernetes/refusals.py": CPU,
    "launch/engines/kubernetes/pod/fabrics.py": "CPU, which renders it",
    "service/spec/kubernetes.py": CPU,
    "service/distributed/world.py": SIM,
    "launch/processes/agent.py": SIM,
    "launch/cli.py": CPU,
    "launch/commands/doctor.py": SIM,
    "launch/commands/jobs.py": SIM,
    "launch/commands/sweep.py": SIM,
    "launch/rank/joining.py": SIM,
    "launch/nodes/node_part.py": CPU,
    "launch/rank/network.py": CPU,
    "launch/rank/process_group.py": SIM,
    "launch/commands/reduction.py": SIM,
}
NVIDIA = "; its branch for NVIDIA: nothing yet"
# Lines within a branch for one kind of device, which nothing in `make test` has run.
NOT_RUN = {
    ("service/distributed/devices.py", "self._seed = module_of(device).manual_seed"),
    (
        "launch/commands/doctor.py",
        'told = f"this machine has nvidia-smi, but torch {torch.__version__} sees no GPU"',
    ),
    (
        "launch/commands/doctor.py",
        'fix = "Install a torch built for CUDA, and check the driver with nvidia-smi."',
    ),
    (
        "launch/commands/doctor.py",
        'words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]',
    ),
    ("launch/commands/doctor.py", 'told += f", CUDA {torch.version.cuda}, driver {_driver()}"'),
}
APPLE = "; its branch for Apple: nothing yet"
# Lines that still name one vendor: why, and what of it nothing has run.
NAMED: dict[tuple[str, str], tuple[str, str]] = {
    (
        "launch/rank/network.py",
        "return f\"{name}; NCCL_IB_DISABLE keeps it from the RDMA devices {', '.join(found)}\"",
    ): ("NCCL's own setting", "; NCCL's choice of a network: nothing yet"),
    (
        "launch/rank/network.py",
        'return environ.get("NCCL_IB_DISABLE", "0") not in ("", "0")',
    ): ("as above", "; NCCL's choice of a network: nothing yet"),
    (
        "launch/rank/network.py",
        'wanted = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(path)}',
    ): ("as above: doctor reads in its log which network NCCL took", "; that log: nothing yet"),
    (
        "launch/commands/doctor.py",
        '"Unset NCCL_IB_DISABLE and NCCL_NET; let a container use the devices and lock memory "',
    ): ("as above", ""),
    (
        "launch/rank/network.py",
        'variable = "GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME"',
    ): ("each backend has its own variable", "; NCCL's choice of a network: nothing yet"),
    ("service/optimization/precision.py", "before = torch.backends.cudnn.benchmark"): (
        "cuDNN's own setting",
        "; its effect: nothing yet",
    ),
    ("service/optimization/precision.py", "torch.backends.cudnn.benchmark = wanted or before"): (
        "as above",
        "; its effect: nothing yet",
    ),
    ("service/optimization/precision.py", "torch.backends.cudnn.benchmark = before"): (
        "as above",
        "; its effect: nothing yet",
    ),
    (
        "service/distributed/devices.py",
        'current = getattr(module_of(device), "current_device", None)  # torch.mps has but one',
    ): ("only the comment does", ""),
    ("service/distributed/devices.py", 'return device.type not in ("cpu", "mps")'): (
        "Apple's devices share the main memory: there is nothing to pin",
        APPLE,
    ),
    (
        "service/basics/errors.py",
        'r"|OUT_OF_(DEVICE|HOST)_MEMORY|Failed to CUDA (calloc|host alloc|malloc)"',
    ): ("each library has its own words", "; none of these errors was seen yet"),
    (
        "service/health/watchdog.py",
        '_DEVICE_WAITING = ("torch/cuda/", "torch/xpu/", "torch/npu/", "torch/accelerator/", '
        '"torch/_tensor")',
    ): ("files of torch, each vendor's its own", "; none of these files was seen in a hang yet"),
    (
        "service/evaluation/metrics.py",
        'self._on = torch.device("cpu") if device.type == "mps" else device',
    ): ("Apple's devices have no float64", APPLE),
    (
        "service/optimization/optimizers.py",
        'p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in '
        "parameters",
    ): ("where torch has fused kernels", "; the fused kernels of devices: nothing yet"),
    (
        "service/distributed/world.py",
        'self.wide = torch.float32 if self.device.type == "mps" else torch.float64',
    ): ("Apple's devices have no float64", APPLE),
    (
        "launch/processes/agent.py",
        '"TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", '
        '"1"),',
    ): ("NCCL's own setting", "; its effect: nothing yet"),
    ("launch/commands/doctor.py", 'if shutil.which("nvidia-smi"):'): (
        "a driver without a torch that uses it",
        NVIDIA,
    ),
    (
        "launch/commands/doctor.py",
        'told = f"this machine has nvidia-smi, but torch {torch.__version__} sees no GPU"',
    ): ("as above", NVIDIA),
    (
        "launch/commands/doctor.py",
        'fix = "Install a torch built for CUDA, and check the driver with nvidia-smi."',
    ): ("as above", NVIDIA),
    (
        "launch/commands/doctor.py",
        'if accelerator.type == "cuda" and torch.version.hip is not None:',
    ): ("torch gives AMD's devices the name of NVIDIA's", "; its branch for AMD: nothing yet"),
    ("launch/commands/doctor.py", 'elif accelerator.type == "cuda":'): (
        "versions of CUDA and of the driver",
        NVIDIA,
    ),
    (
        "launch/commands/doctor.py",
        'told += f", CUDA {torch.version.cuda}, driver {_driver()}"',
    ): ("as above", NVIDIA),
    (
        "launch/commands/doctor.py",
        'words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]',
    ): ("as above", NVIDIA),
    (
        "launch/commands/doctor.py",
        'fix = "Check the firewall on loopback; for NCCL, set NCCL_DEBUG=INFO."',
    ): ("NCCL's own setting", ""),
    ("launch/engines/kubernetes/pod/fabrics.py", '"infiniband": {"NCCL_NET": "IB"},'): (
        "NCCL's own setting, of a profile that the user names",
        "; its effect: nothing yet",
    ),
    (
        "launch/engines/kubernetes/pod/fabrics.py",
        '"efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"},',
    ): ("as above", "; its effect: nothing yet"),
    (
        "launch/engines/kubernetes/pod/fabrics.py",
        '"tcp": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},',
    ): ("as above", "; its effect: nothing yet"),
    ("launch/commands/sweep.py", '"cuda": "CUDA_VISIBLE_DEVICES",  # NVIDIA and AMD'): (
        "each maker has a variable of its own for the devices that a process sees",
        "; its effect: nothing yet",
    ),
    ("launch/commands/sweep.py", '"xpu": "ZE_AFFINITY_MASK",'): (
        "as above",
        "; its effect: nothing yet",
    ),
    ("launch/commands/sweep.py", '"npu": "ASCEND_RT_VISIBLE_DEVICES",'): (
        "as above",
        "; its effect: nothing yet",
    ),
    ("launch/nodes/node_part.py", '_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")'): (
        "NCCL's own setting",
        "; its effect: nothing yet",
    ),
    ("launch/nodes/node_part.py", 'os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")'): (
        "NCCL's own setting",
        "; its effect: nothing yet",
    ),
    ("launch/rank/joining.py", 'os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")'): (
        "NCCL's own setting",
        "; its effect: nothing yet",
    ),
    (
        "service/optimization/precision.py",
        "_IN_CUDNN = (_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)",
    ): (
        "only cuDNN has such a switch",
        "; its effect: nothing yet",
    ),
    ("service/optimization/precision.py", "products, in_cudnn = None, None"): ("as above", ""),
    (
        "service/optimization/precision.py",
        "products, in_cudnn = torch.get_float32_matmul_precision(), "
        "torch.backends.cudnn.allow_tf32",
    ): ("as above", "; its effect: nothing yet"),
    (
        "service/optimization/precision.py",
        "torch.backends.cudnn.allow_tf32 = True if in_cudnn is None else in_cudnn",
    ): ("as above", "; its effect: nothing yet"),
    (
        "service/optimization/precision.py",
        'torch.backends.cudnn.allow_tf32 = precision == "tf32"',
    ): ("as above", "; its effect: nothing yet"),
    (
        "service/distributed/world.py",
        'return " ".join(["", *found, "NCCL_DEBUG=INFO shows what NCCL did before."])',
    ): ("NCCL's own setting", ""),
    ("service/optimization/compilation.py", 'if device.type != "cuda":'): (
        "torch makes CUDA graphs of no other kind",
        "",
    ),
    (
        "launch/rank/process_group.py",
        'os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")',
    ): ("only cuBLAS asks for it", "; its effect: nothing yet"),
}


def lines() -> Iterator[tuple[str, str]]:
    """(module, line) of each, in order; comments, docstrings and imports left out."""
    for folder in ("service", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line in code_of(path.read_text()):
                if ASKS.search(line) or VENDOR.search(line):
                    yield path.relative_to(ROOT).as_posix(), line


def code_of(text: str) -> Iterator[str]:
    quoted = False
    for raw in text.splitlines():
        line = raw.strip()
        marks = line.count('"""')
        if quoted or marks or line.startswith(("#", "import ", "from ", "def ")):
            quoted ^= marks % 2 == 1
            continue
        yield line


def vendor_lines() -> set[tuple[str, str]]:
    """Those that name one vendor."""
    return {(module, line) for module, line in lines() if VENDOR.search(line)}


def table() -> str:
    """The table of docs/reference/devices.md."""
    rows = ["| module | line | run by | real GPU (date, card) |", "|---|---|---|---|"]
    for module, line in dict.fromkeys(lines()):
        rest = NAMED.get((module, line), ("", ""))[1]
        shown = line.replace("|", "\\|")
        ran = "nothing yet" if (module, line) in NOT_RUN else f"{RAN[module]}{rest}"
        rows.append(f"| {module} | `{shown}` | {ran} | nothing yet |")
    rows += ["", "Lines that still name one vendor, and why:", "", "| module | line | why |"]
    rows += ["|---|---|---|"]
    rows += [f"| {module} | `{line}` | {why} |" for (module, line), (why, _) in NAMED.items()]
    return "\n".join(rows)


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
