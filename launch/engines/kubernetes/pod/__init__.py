"""The pod of a node: its fields, the settings of fabric, queue and metrics, security. No torch.

From top to bottom; a room imports only from rooms below it:

* security: the exceptions to Pod Security `restricted` in a pod template, by name. Pure.
* pod_template: merges the spec's `pod_template` over the rendered one, as a strategic merge patch
  does. Pure.
* pods: the pod of one node, the same under every target; `k8s/README.md` gives each field's
  reason.
* queues: the settings of queues and gang schedulers: labels, annotations, scheduler name,
  PodGroup.
* monitoring: how a cluster's Prometheus finds and reaches the metrics of a run, and the liveness
  probe.
* fabrics: the variables that restrict NCCL to one network between nodes.
"""
