"""Files of models: which there are, which may be loaded, and how one becomes a program.

`sources` names the files that a server begins with, those of the command line and those in a `folder`. `programs` makes a
program of a file, or reads one. It knows neither the engine's parts nor the catalog.
"""
