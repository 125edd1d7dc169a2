"""The files of models: finding them, checking them, and turning them into programs.

`sources` lists the files that a server loads at its start, from the command line and the `folder`. `programs`
compiles a file or reads a compiled one. It uses neither the engine's internals nor the catalog.
"""
