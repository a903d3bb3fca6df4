"""One process of a job: how it joins the others, what it runs, and how it ends.

From top to bottom; a room imports only from rooms below it:

* entry: the main function of every process of a job, and the report of its end.
* same_command: whether all processes of a job were started by the same command.
* process_group: joins this process to the others on its device, and provides the `World`.
* joining: how the processes of a job connect through a store that others may have modified.
* attempts: the part of torchrun's store that belongs to one attempt.
* store: the store through which processes find each other: in memory, or at one address of the
  machine.
* network: the bandwidth between the nodes of a job: before its first step, and for
  `evenstep doctor`.
* trial: short-lived processes of a test all-reduce, started together and killed together. No torch.
* job: the description of a run or test that a launcher passes to its processes. No torch.
* exit: ends a process with its exit code and in time, even if its libraries block the exit.
"""
