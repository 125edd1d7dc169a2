"""The commands of `stepwell` that need the server's code. `stepwell.cli` loads them as entry points when they are called.

options.py      settings as options of a command; `stepwell_server.settings` defines them
compiling.py    what check and compile have in common
described.py    describes a compiled file, for models show
serve.py check.py compile.py    the commands
"""
