"""The variables that hold NCCL to one network between nodes; docs/how-to/cluster-options.md."""

from __future__ import annotations

from service.spec.kubernetes import KubernetesSpec

FABRICS: dict[str, dict[str, str]] = {
    # NCCL_NET names the one network that NCCL may use: without it the job ends with an error,
    # where NCCL would otherwise fall back to TCP and go on, many times slower.
    # Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    "infiniband": {"NCCL_NET": "IB"},
    # Source: https://github.com/aws/aws-ofi-nccl, doc/efa-env-var.md: with huge pages, a forked
    # loader worker can fail for lack of them.
    "efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"},
    "tcp": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},
}


def fabric_variables(cluster: KubernetesSpec) -> dict[str, str]:
    """Those of the spec's fabric. One node has none: its devices need no network."""
    if cluster.fabric is None or cluster.nodes == 1:
        return {}
    variables = dict(FABRICS[cluster.fabric])
    if cluster.hugepages:  # they were asked for to be used
        variables.pop("FI_EFA_USE_HUGE_PAGE", None)
    return variables
