"""A job on a Kubernetes cluster: its manifests, and the requests to the cluster. No torch."""
