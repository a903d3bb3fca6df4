"""Everything that follows from the spec by arithmetic: rows, steps, rates.  Pure; no torch.

From top to bottom; a room imports only from rooms below it:

* plan: the plan of a run: sizes, and at which step something is due. Pure arithmetic.
* schedules: learning-rate schedules: pure functions of the step.
* sampling: which row is used when, if not each once per epoch: weights, mixtures, a curriculum.
  Pure.
* samplers: which rows belong to which step and micro-batch, and which micro-batches to which
  process.
* early_stopping: early stopping: which of two measures is better, and whether one has stopped
  improving.
* changing: what may change between two attempts at a run: two specs compared, key by key.
"""
