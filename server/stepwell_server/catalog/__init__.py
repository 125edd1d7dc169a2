"""Models and their versions, as people and folders ask for them: loads, uploads, defaults, and what a restart brings back.

`catalog` loads and unloads versions; `files/` finds the files and turns them into programs. It may use the compiler,
the engine's API and files, but neither the gRPC code nor the engine's internals.
"""
