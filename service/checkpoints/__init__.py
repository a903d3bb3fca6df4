"""Saving and restoring the state of a run, by all processes together.

From top to bottom; a room imports only from rooms below it:

* trained: the model of a run with the weights of one of its checkpoints, on the CPU.
* checkpoints: saves and restores the checkpoints of a run, by all processes together.
* shards: the shards of a checkpoint: which process writes which bytes, and the buffer they come
  from.
* pretrained: exports what only the task's model can write: a directory of transformers, merged
  adapters.
* initial_weights: the weights that a run begins with, where the spec's `init` names them.
* snapshots: A training state as named tensors and plain values, and back.
"""
