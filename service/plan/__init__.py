"""What follows from the spec by arithmetic alone: rows, steps, rates.  Pure; no torch.

From top to bottom; a room imports only from rooms below it:

* plan: what follows from the spec, the row counts and the process count: sizes, and when what
  happens.
* schedules: learning-rate multipliers: pure functions of the step, the same at any number of
  processes.
* samplers: which rows belong to which step and micro-batch, and which micro-batches to which
  process.
* early_stopping: which of two test measures is the better, and whether one has stopped improving.
"""
