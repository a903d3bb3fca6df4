"""Rows in files, in a bucket or a directory, read as a stream.

From top to bottom; a room imports only from rooms below it:

* tar: webDataset shards: tar files, in which members with one name before the first dot are one
  row.
* rows: `rows_in`: the rows of files in a bucket or a directory, as a stream with a position.
* parquet: parquet files: a row group is a part, and only the bytes of its needed columns are
  read.
* mds: mosaic's MDS shards, read by their index, without the library (which needs torchvision).
* arrow: data sets of the `datasets` library, as `save_to_disk` writes them: Arrow files.
* parts: what every format gives: files, their parts, and the rows of a part.
* files: the files of a data set: found by an address, and read from a directory or a bucket.
* columns: the rows of an Arrow table: numbers as numpy's values, all else as Python's.
* cache: A directory of downloaded parts of objects, with a size limit, used by several processes.
"""
