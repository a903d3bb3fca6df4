"""The test loop, and the measures it takes: each row of the test set counted once.

From top to bottom; a room imports only from rooms below it:

* test_loop: the test loop. No rank appears in it: `world` is all processes as one.
* own_step_test: what a test pass counts where the task has a step of its own.
* predictions: the model's prediction for each row of the test set, gathered and written once.
* named_sums: sums by name, each with its weight, merged exactly over micro-batches and processes.
* metrics: measures of the test loop that merge exactly, for any distribution of rows over
  processes.
* hooks: hooks of the task, after a test or an epoch: called on rank 0, and unable to change the
  run.
"""
