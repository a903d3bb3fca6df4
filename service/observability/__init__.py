"""Output of a run: the console, W&B and other trackers, the report.  No torch.

From top to bottom; a room imports only from rooms below it:

* wandb_writer: the W&B writer: one background thread makes all calls of wandb.
* other_writers: the trackers besides W&B in a spec, each as a background writer.
* trackio_backend: the backend of Hugging Face's trackio: a local database, or a Space.
* tensorboard_backend: the TensorBoard backend: an event file in the run's directory.
* report: the report: one self-contained page about one or several runs.
* sweeps: A sweep: its runs, and each setting's mean and deviation over seeds. No torch.
* mlflow_backend: the backend of MLflow: a run on a tracking server, or in a local database.
* background_writer: sends the rows of a run to a tracker from a background thread.
* logged_files: images, texts, histograms and files that hooks log, in the directory of the run.
* console: the console: a live bar on a terminal, one plain line for each row elsewhere.
* charts: curves as inline SVG: pure functions, the same text for the same numbers.
"""
