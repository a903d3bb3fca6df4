"""The directory of a run: its files, and how they are written and read.  No torch.

From top to bottom; a room imports only from rooms below it:

* verification: verifies that two runs took the same steps: by rows, losses or bits. No torch.
* tracking: tracking: one `log(step, values)` for all writers of metrics.
* receipt_file: receipt.jsonl on disk: digests of each step's rows, and of the weights at
  checkpoints.
* history: the history of a run, read from its directory without changing anything.
* metrics_file: reads metrics.jsonl: all rows, single curves, or only its end. No torch.
* line_file: reads files of JSON lines block by block, in bounded memory.
* directory: the directory of a run: its layout, its lock, and its metadata (run.json).
* goodput: goodput: steps done, steps repeated, and the seconds of each kind of work.
* failure_reports: failure reports: one JSON file for each failed process, without secrets.
* export: exports the weights of a checkpoint as one safetensors file. No torch.
* checkpoint_files: checkpoints on disk: their names, their files, and their verification. No
  torch.
"""
