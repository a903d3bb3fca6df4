"""Sharded data parallelism: each process has some rows of every parameter.

From top to bottom; a room imports only from rooms below it:

* row_updates: changes of weights of which each process has only some rows, such as those of a
  task's function.
* sharding: sharded data parallelism (torch's FSDP2): each process has some rows of every
  parameter.
* deferred_init: models created without memory for their weights, whose values are created later,
  one by one.
* cpu_exchange: the exchange of FSDP2's units between processes on CPUs, with little memory.
* heap: main memory of a sharded run on CPUs: what is kept when it is freed, what is returned.
"""
