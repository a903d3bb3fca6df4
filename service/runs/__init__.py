"""The directory of a run: what is written into it, and what can be read from it.  No torch.

From top to bottom; a room imports only from rooms below it:

* verification: whether two runs took the same steps: by their rows, their losses, or to the bit.
  No torch.
* tracking: what a run has to say while it trains: one `log(step, values)` for every place that
  keeps it.
* receipt_file: receipt.jsonl on disk: digests of each step's rows, and of the weights at
  checkpoints.
* history: runs as they are remembered: what their directories say, read without touching
  anything.
* metrics_file: metrics.jsonl as it is read: whole rows, single curves, or no more than its end.
  No torch.
* line_file: files of JSON lines as they are read: block by block, in memory that no file can
  exceed.
* directory: A run's directory: what stands where in it, who may write to it, and what it
  remembers.
* goodput: where the time of a run went: steps done, steps done again, seconds of each kind of
  work.
* failure_reports: failure reports: one JSON file for each process that failed, with nothing
  secret in it.
* export: the weights of a checkpoint as one file that needs nothing of ours to be read.  No
  torch.
* checkpoint_files: checkpoints on disk: their names, their files, and whether to believe them.
  No torch.
"""
