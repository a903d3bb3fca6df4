"""Common parts of all wings: errors, files, limits, keys of random numbers.  No torch.

From top to bottom; a room imports only from rooms below it:

* secret_names: which environment variables hold secrets, by their names. Pure.
* running_time: time limits that count only the time in which this process has run.
* randomness: keys for random numbers: each is named by its purpose, so there is no stream to
  save.
* process_starts: when a process started: with its number, what tells it from a later one of that
  number. No torch.
* multipart: large files in parts that several threads and processes write at the same time. No
  torch.
* limits: the cores and the memory that this process may use, as a container limits them. No
  torch.
* atomic_files: atomic files: written, synced and renamed in an order that survives a power loss.
* errors: the errors that end a run, as one tree, with their exit codes.
* background_queue: A queue from the training thread to a background thread, which is not woken
  for each item.
"""
