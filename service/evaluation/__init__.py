"""The test loop and its measures: each row of the test set counts once.

From top to bottom; a room imports only from rooms below it:

* test_loop: the test loop. It contains no ranks: `world` is all processes as one.
* own_step_test: the sums of a test pass for a task with its own step.
* predictions: the model's prediction for each row of the test set, gathered and written once.
* named_sums: sums by name, each with its weight, merged exactly over micro-batches and processes.
* metrics: measures of the test loop that merge exactly, for any distribution of rows over
  processes.
* hooks: hooks of the task, after a test or an epoch: called on rank 0; they cannot change the
  run.
"""
