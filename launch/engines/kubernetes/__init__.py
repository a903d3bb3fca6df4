"""A job on a cluster: the manifests, and the few words spoken to a cluster about them. No torch."""
