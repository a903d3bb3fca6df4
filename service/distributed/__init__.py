"""All processes as one: sums, gradients, BatchNorm, stragglers.

From top to bottom; a room imports only from rooms below it:

* gradient_sync: how the gradients of a step's micro-batches come together, over all processes.
* stragglers: how the processes of a run are: their memory, and whether one of them keeps the
  others waiting.
* batchnorm: batchNorm in a job of many processes: what a layer normalises with, and when its
  memory moves.
* agreed_stop: all processes agree on the step, or the place in a test, at which they follow a
  stop.
* world: all processes of a job as one: the only room that knows ranks, torch.distributed,
  accelerate.
* recursive_doubling: sums of a few numbers over processes on CPUs, by messages between pairs of
  them.
* profiler: A trace of a few steps, one file for each process, and a table of where their time
  went.
* messages: what processes tell each other, as bytes and back: plain data, and nothing that runs.
* devices: what a device offers besides tensors, asked of torch's module for its kind and not by a
  vendor.
* generators: the generators that a person's code draws from without naming one: Python's,
  numpy's, torch's.
"""
