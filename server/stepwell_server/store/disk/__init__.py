"""Sessions on a local disk: all of them in LMDB, and in front of it a write-ahead log of what happened to them last.

`store` is what the server uses; it puts the write-ahead log (`wal`) before `lmdb` (with `keys`).
`lock` is the use of the folder by one server, `files` says whether the files are still in their places, and `reserve` is
room for ending sessions on a full disk. Only `lmdb` imports LMDB; nothing in here knows the engine.
"""
