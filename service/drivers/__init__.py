"""What talks to an object store, and what its errors mean. No torch.

From top to bottom; a room imports only from rooms below it:

* troubles: what goes wrong with an object store, in words: the error of a driver, read. Pure.
* endpoints: which store an address means here: the endpoint or the account that the environment
  sets.
* s3: the requests to S3 that runs and data sets need, by botocore.
"""
