"""The `evenstep` command: one module for each command or group of commands.

From top to bottom; a room imports only from rooms below it:

* sweep: `evenstep sweep`: the product of several values, each setting a run on this machine.
* runs: the commands that show runs: `runs`, `watch` and `report`.  No torch.
* reduction: one process of a test all-reduce: `python -m launch.commands.reduction BYTES`.
* jobs: the commands that come before a run: `new`, `check` and `doctor`.
* fork: `evenstep fork`: a new run that starts from a checkpoint of another one.
* checkpoints: `evenstep checkpoints` and `evenstep export`: list, verify and export what a run
  has saved.
* engines: the commands of every engine, from its contract: render, submit, status, logs, cancel.
* overrides: `KEY=VALUE` and `--set-file`, for every command with a spec.
* places: what a command line calls a place: of runs, a directory or an address in an object
  store; of a file.
* new_job: `evenstep new`: a directory with a task, a spec, and the schema for an editor.
* doctor: the checks of `evenstep doctor`: the machine, from the point of view of a job.
"""
