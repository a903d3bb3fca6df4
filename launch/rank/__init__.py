"""One process of a job: how it joins the others, what it runs, and what its end is called.

From top to bottom; a room imports only from rooms below it:

* entry: what every process of a job runs, and how its end is reported.
* process_group: joins this process to the others on its device, and provides the `World`.
* joining: how the processes of a job join through a store that strangers may have written to.
* store: the store through which processes find each other, bound to one address of the machine.
* job: what is to be run or tested, as a launcher holds it and a process receives it. No torch.
* exit: how a process leaves: with its exit code and in time, whatever its libraries do.
"""
