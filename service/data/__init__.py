"""The user's task and its data on the way to the device: tasks, rows, batches, streams.

From top to bottom; a room imports only from rooms below it:

* own_step: A task's own step as a module, so that DDP sees all its forward passes as one.
* loading: from a data set to micro-batches on the device: one list of them for each optimizer
  step.
* task: the task that the user brings: a model, its data, its loss and its measures.
* loaders: dataLoaders and samplers of torch that the user passes: interpreted, or refused with a
  hint.
* streams: data that can only be read in order, and is resumed at the position where it was left.
* shapes: checks the shapes of a task's loss, weight and measures in every micro-batch.
* serialization: the state of a foreign object as JSON and back, without a pickle.
* losses: the result of a task's own step: named losses, each a sum with its weight.
* in_memory: data sets whose rows are tensors in memory: selected by index, one micro-batch at a
  time.
* batches: A micro-batch: collated rows with their weights, on the device that computes them.
"""
