"""Runs that live in an object store: what their launchers do.

From top to bottom; a room imports only from rooms below it:

* leading: Node 0 of an elastic job whose run is in a store: what the other nodes of a generation
  bring.
* in_store: A run that lives in an object store: what its launcher does before and after the
  processes.
* under_torchrun: A run in a store that torchrun has started: rank 0 trains in a child, and its
  parent uploads.
* copied: A copy of a run in a store, which the processes of torchrun on one machine share to test
  it.
* swept: A sweep whose runs live in an object store: the settings of its runs, and copies of them.
* following: A further node of a run in a store: it brings what node 0 has published, and uploads
  nothing.
"""
