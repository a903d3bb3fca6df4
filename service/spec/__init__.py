"""What the user wants: the spec, as a model, as a file, and as a page.  No torch.

From top to bottom; a room imports only from rooms below it:

* page: the page that explains every key of a spec, from the schema that editors are given.  Pure.
* new_job: A directory to begin a job of one's own in: a task, a spec, and the schema for an
  editor.
* files: A spec as a file: read with every fault named at its place, written back, compared,
  described.
* models: what the user wants: one frozen, strict model of a job. `spec_file` reads one from a
  file.
* optimizer_options: the options of every optimizer of torch.optim, as data, so that a spec is
  checked without torch.
* documents: A YAML, JSON or TOML file as plain values, with the place where each of them is
  written.
"""
