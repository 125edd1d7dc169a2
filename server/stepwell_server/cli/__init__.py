"""The commands of `stepwell` that need the server's code. `stepwell.cli` finds them by name, when they are called.

setting.py      an option, or argument, whose value may also come from a variable or the config file
values.py       the types of their values
config_file.py  the config file, read and written
compiling.py    what check and compile have in common
described.py    a compiled file in the protocol's words, for models show
serve.py check.py compile.py    the commands
"""
