"""Sharded data parallelism: each process holds some rows of every parameter.

From top to bottom; a room imports only from rooms below it:

* sharding: sharded data parallelism (torch's FSDP2): each process holds some rows of every
  parameter.
* deferred_init: models made without memory for their weights, whose values are made later, one
  after the other.
"""
