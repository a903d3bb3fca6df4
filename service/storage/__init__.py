"""Runs that live in an object store: brought to a directory, and uploaded from it.  No torch.

From top to bottom; a room imports only from rooms below it:

* beside: A run that lives in a store: brought here, trained in a scratch directory, uploaded
  beside it.
* mirror: uploads the directory of a run to its address in a store, beside the run.
* staging: the files of a run as they are at one moment, held by links while they are uploaded.
* scratch: the scratch directory of a run that lives in a store: whether what is there may go on,
  and what.
* copies: copies of runs in a store that are looked at again and again; a look requests only what is
  new.
* reading: reads a run that lives in a store: what a command needs of it is copied to a temporary
  place.
* lease: the lease of a run in a store: it replaces the lock of a directory.
* bringing: brings a run from a store to a directory: the needed files, in parallel, verified.
* published: what a store holds of a run: one small object, written last, that names all others.
* store: the door to an object store: all requests are made here, and tried again while they may
  succeed.
* address: the address of runs in an object store, `s3://bucket/prefix`. Pure: no driver is
  imported.
"""
