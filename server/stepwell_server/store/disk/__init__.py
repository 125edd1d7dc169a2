"""Sessions on a local disk: all of them in LMDB, with a write-ahead log of their latest changes in front of it.

The server uses `store`, which puts the write-ahead log (`wal`) in front of `lmdb` (with `keys`). `lock` allows one
server per folder, `files` checks that the files are still in their places, and `reserve` keeps room for ending sessions
on a full disk. Only `lmdb` imports LMDB; nothing in here knows the engine.
"""
