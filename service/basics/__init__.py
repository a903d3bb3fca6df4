"""What everything above may need: errors, files, limits, keys of random numbers.  No torch.

From top to bottom; a room imports only from rooms below it:

* randomness: keys for random numbers: each is named by what it is for, so none is drawn from a
  running stream.
* multipart: large files in parts, which several threads and processes write side by side.  No
  torch.
* limits: what this process may use of its machine, as a container limits it.  No torch.
* atomic_files: files that outlive the machine: written, synced and renamed in the order a power
  cut respects.
* errors: everything that ends a run early, as one tree with the exit code a shell, torchrun or a
  pod sees.
* background_queue: from the training thread to one that may take its time, without waking it.
"""
