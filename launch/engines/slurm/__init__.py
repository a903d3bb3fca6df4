"""A job on Slurm: its script, and the requests to the controller. No torch.

From top to bottom; a room imports only from rooms below it:

* engine: Slurm as one of the engines: render, submit, status, logs, cancel.
* queue: what is asked of Slurm's own commands, and what they answer.
* script: renders a spec as a script for sbatch: a pure function.
* states: the states of a job and the reasons why it waits, in words. Pure.
* allowance: how long Slurm lets this attempt run, and whether the rest of the run fits in.
"""
