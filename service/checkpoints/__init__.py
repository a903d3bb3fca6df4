"""Saving and restoring the state of a run, by all processes together.

From top to bottom; a room imports only from rooms below it:

* checkpoints: checkpoints of a run: taken by all processes together, published by one, whole or
  not.
* shards: who writes which part of a state's files, and the kept copy of what a process writes.
* pretrained: A checkpoint as a directory that the `from_pretrained` of transformers reads.
* snapshots: A training state as named tensors and plain values, and the way back.
"""
