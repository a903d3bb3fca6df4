"""One process of a job: how it joins the others, what it runs, and what its end is called.

From top to bottom; a room imports only from rooms below it:

* entry: what every process of a job runs: spec, world, task, plan, worker; and what its end is
  called.
* process_group: joins this process to the others, on the device it computes on, and hands out a
  `World`.
* joining: how the processes of a job join: through a store in which a stranger may have written.
* store: the store through which processes find each other, on one address of the machine.
* job: what is to be run or tested, as a launcher holds it and a process receives it.  No torch.
* exit: how a process of ours leaves: with its exit code and in time, whatever its libraries would
  do.
"""
