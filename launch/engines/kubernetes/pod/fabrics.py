"""The variables that restrict NCCL to one network between nodes; docs/how-to/cluster-options.md."""

from __future__ import annotations

from service.spec.kubernetes import KubernetesSpec

FABRICS: dict[str, dict[str, str]] = {
    # NCCL_NET names the only network that NCCL may use: without it the job ends with an error,
    # instead of a silent fallback to TCP, many times slower.
    # Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
    "infiniband": {"NCCL_NET": "IB"},
    # Source: https://github.com/aws/aws-ofi-nccl, doc/efa-env-var.md: with huge pages, a forked
    # loader worker can fail for lack of them.
    "efa": {"NCCL_NET": "AWS Libfabric", "FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"},
    "tcp": {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"},
}


def fabric_variables(cluster: KubernetesSpec) -> dict[str, str]:
    """The variables of the spec's fabric. A single node needs none: its devices need no network."""
    if cluster.fabric is None or cluster.most_nodes == 1:
        return {}
    variables = dict(FABRICS[cluster.fabric])
    if cluster.hugepages:  # they were requested, so use them
        variables.pop("FI_EFA_USE_HUGE_PAGE", None)
    return variables
