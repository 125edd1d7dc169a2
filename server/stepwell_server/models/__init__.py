"""With which models a server begins, and how a file becomes a program; `live/` has what comes and goes afterwards.

`sources` says which files are served at the start, those of the command line and those in a `folder`; `loading` loads
them while the front already listens, and `programs` has a file compiled, or reads one that was. `migrations` are the
operator's functions that make states for another version. It may touch the compiler, files and settings; it knows
neither the engine's parts nor the wire.
"""
