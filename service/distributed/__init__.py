"""Communication between processes: sums, gradients, BatchNorm, stragglers.

From top to bottom; a room imports only from rooms below it:

* gradient_sync: gradient synchronization: how the gradients of the micro-batches of a step are
  summed.
* stragglers: peak memory of the processes, and detection of a straggler that the others wait for.
* batchnorm: batchNorm on several processes: which statistics a layer uses, and when they are
  updated.
* agreed_stop: all processes agree on the step, or the position in a test, at which they stop.
* world: all processes of a job as one. Only this module knows ranks, torch.distributed,
  accelerate.
* recursive_doubling: sums of small tensors over processes on CPUs, in pairs or over a tree.
* profiler: A trace of a few steps, one file for each process, with a table of the time spent.
* messages: messages between processes as bytes and back: plain data, no executable content.
* devices: device functions besides tensors, through torch's module for its kind, not a vendor's.
* generators: the global random generators of Python, numpy and torch.
* contention: lets threads that wait for each other spin on idle cores, and sleep on shared cores.
"""
