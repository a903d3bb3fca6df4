"""Saving and restoring the state of a run, by all processes together.

From top to bottom; a room imports only from rooms below it:

* trained: the model of a run with the weights of one of its checkpoints, on the CPU.
* checkpoints: saves and restores the checkpoints of a run, by all processes together.
* shards: the shards of a checkpoint: which process writes which bytes, and the buffer for them.
* pending_copies: copies of a state that are made while the next pass runs, before the update that
  changes it.
* pretrained: exports that need the task's model: a directory of a transformers model, merged
  adapters.
* initial_weights: the initial weights of a run, if the spec's `init` names a source.
* snapshots: A training state as named tensors and plain values, and its restoration.
* packing: the state of an optimizer as named tensors and JSON values, and its restoration.
"""
