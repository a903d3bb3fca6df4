"""What the user brings, and its way to the device: tasks, rows, batches, streams.

From top to bottom; a room imports only from rooms below it:

* loading: from a data set to micro-batches on the device: one list of them for each optimizer
  step.
* task: what the user brings: a model, its data, its loss and its measures.
* streams: data that can only be read one after the other, and taken up again where it was left.
* shapes: what a task's loss, weight and measures must have the shape of, for every micro-batch.
* serialization: values of a foreign state as JSON and back, without a pickle: tensors, arrays,
  bytes, tuples.
* in_memory: rows that are tensors in memory: they are picked by index, a micro-batch at a time.
* batches: A micro-batch: rows brought together, with what they weigh, on the device that computes
  them.
"""
