"""A section of a spec: frozen, strict, with the patterns that fields share."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MOST = 10**15
"""The maximum of any count in a spec: it and sums of such counts are exact."""


class Part(BaseModel):
    """A section of a spec: an unknown key is an error, a wrong type is not converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        defer_build=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_counted(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        counts = type(value) is int or (type(value) is float and name.endswith("epochs"))
        if counts and name != "seed" and MOST < value < math.inf:
            raise wrong(f"must be at most {MOST:.0e}")
        return value


def wrong(message: str) -> PydanticCustomError:
    """An error with our own text, which pydantic reports together with its own."""
    return PydanticCustomError("evenstep", "{message}", {"message": message})


# Patterns, each with its description for messages; and the most letters of the name of a run.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RUN_NAME_LETTERS = 63
IMPORT_STRING = r"^([\w.]+|[^:]+\.py):\w+$"
TEST_MEASURE = r"^test/\S+$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
# Neither spaces nor control characters, of which NUL would cut off a text.
ABSOLUTE_PATH = r"^/[^\s\x00-\x1f\x7f:]+$"
RELATIVE_PATH = (
    r"^\.?[^/\s\x00-\x1f\x7f:.][^/\s\x00-\x1f\x7f:]*"
    r"(/\.?[^/\s\x00-\x1f\x7f:.][^/\s\x00-\x1f\x7f:]*)*$"
)
ADDRESS = r"^[a-z][a-z0-9+.-]*://[^\s\x00-\x1f\x7f]+$"
DATA_KEY = r"^\.?[A-Za-z0-9_-][A-Za-z0-9._-]{0,251}$"
IMAGE = (
    r"^[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)
DEVICE = r"^(cpu|[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]*)$"
LABEL = r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
RESOURCE = r"^[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"
HUGE_PAGE = r"^[1-9][0-9]*(Ki|Mi|Gi)$"
CAPABILITY = r"^[A-Z][A-Z_]*$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
SLURM_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.,@-]*$"
SLURM_CONSTRAINT = r"^[A-Za-z0-9_.:*&|()\[\]-]+$"
SLURM_TIME = r"^([0-9]+-)?[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$"
SLURM_MEMORY = r"^[0-9]+[KMGT]?$"
SLURM_IMAGE = r"^[A-Za-z0-9/.][^\s\x00-\x1f\x7f,:]*(:[^\s\x00-\x1f\x7f,]+)?$"
SLURM_PATH = r"^/[^\s\x00-\x1f\x7f:,]+$"
SBATCH_OPTION = r"^--[a-z][a-z0-9-]*(=[^\s\x00-\x1f\x7f\"'#\\]+)?$"
WORD_OF_A_SHELL = r"^[A-Za-z0-9_./+-]+$"
PATTERNS_IN_WORDS = {
    RUN_NAME: "letters and digits, and after the first one . _ - too",
    IMPORT_STRING: "package.module:Class or ./file.py:Class",
    TEST_MEASURE: "a measure of the test loop, such as test/accuracy",
    QUANTITY: "a Kubernetes quantity, such as 500m, 4 or 16Gi",
    DNS_LABEL: "a DNS label: up to 63 lower-case letters, digits and -",
    DNS_NAME: "a Kubernetes name: lower-case letters, digits, - and .",
    ADDRESS: "an address in object storage, SCHEME://BUCKET/PREFIX",
    ABSOLUTE_PATH: "an absolute path without spaces and :",
    RELATIVE_PATH: "a relative path without .., spaces and :, such as images/train",
    DATA_KEY: "a key of a Secret or ConfigMap: letters, digits, - _ and .",
    IMAGE: "a container image, such as registry.example.com/team/evenstep:0.1.0",
    DEVICE: "cpu, or the cluster's name of a device, such as nvidia.com/gpu",
    LABEL: "the key of a Kubernetes label, such as topology.kubernetes.io/zone",
    LABEL_VALUE: "the value of a Kubernetes label: up to 63 letters, digits, ., _ and -",
    RESOURCE: "the cluster's name of a resource, such as rdma/hca_shared_devices_a",
    HUGE_PAGE: "the size of a huge page, such as 2Mi or 1Gi",
    CAPABILITY: "a Linux capability without CAP_, such as IPC_LOCK",
    VARIABLE: "the name of an environment variable",
    SLURM_NAME: "a name in Slurm, such as gpu or team-vision",
    SLURM_CONSTRAINT: "features of nodes, such as a100 or a100&ib, without spaces",
    SLURM_TIME: "a time as HH:MM:SS or D-HH:MM:SS",
    SLURM_MEMORY: "a size in Slurm's format, such as 500M or 64G",
    SLURM_IMAGE: "a file or a name of an image, without spaces and commas",
    SLURM_PATH: "an absolute path without spaces, commas and :",
    SBATCH_OPTION: "an option of sbatch with two dashes and no spaces, such as --exclusive",
    WORD_OF_A_SHELL: "a command or its path, of letters, digits and _ . / + -",
}


CUSTOM = "package.module:Class"


def tag_by_name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and ":" in name:
        return CUSTOM
    return name if isinstance(name, str) else None
