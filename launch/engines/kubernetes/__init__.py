"""A job on a Kubernetes cluster: its manifests, and the requests to the cluster. No torch.

From top to bottom; a room imports only from rooms below it:

* kustomize: writes k8s/base and its overlays: `python -m launch.engines.kubernetes.kustomize`.
* engine: kubernetes as one of the engines: render, submit, status, logs, cancel.
* manifests: renders a spec as Kubernetes manifests: a pure function.
* submission: creates the objects of a job, also if two submits overlap or one dies.
* jobs: watches the state of a job, reads its logs, cancels it.
* targets: the targets that run the pods: an Indexed Job, a JobSet, or a Kubeflow TrainJob.
* states: the states of a job and its pods as text: pure, from the cluster's objects.
* refusals: errors that a cluster would report, found before the cluster is asked.
* pod: the pod of a node, a package of its own.
* dashboard: the Grafana dashboard of a run, k8s/grafana-dashboard.json: made by `kustomize`
  beside it.
* api: requests to the API server of a cluster, as plain JSON.
* access: finds the cluster and the credentials as kubectl does, with lightkube.
"""
