"""What the user brings, and its way to the device: tasks, rows, batches, streams.

From top to bottom; a room imports only from rooms below it:

* own_step: A step of one's own as a module, so that all forward passes in it are one to DDP.
* loading: from a data set to micro-batches on the device: one list of them for each optimizer
  step.
* task: the task that the user brings: a model, its data, its loss and its measures.
* loaders: A DataLoader or sampler of torch's that a person hands over: understood, or refused in
  words.
* streams: data that can only be read in order, and is resumed at the position where it was left.
* shapes: checks the shapes of a task's loss, weight and measures in every micro-batch.
* serialization: the state of a foreign object as JSON and back, without a pickle.
* losses: what a step of one's own gives: named losses, each a sum with the weight that divides
  it.
* in_memory: data sets whose rows are tensors in memory: picked by index, a micro-batch at a time.
* batches: A micro-batch: collated rows with their weights, on the device that computes them.
"""
