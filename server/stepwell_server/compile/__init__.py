"""From a ``.keras`` file to a `Program`, in a process of its own.

The server calls `launch.compile_program` and never loads TensorFlow; ``python -m stepwell_server.compile``
is the compiling process. Its stages, each a module or two:

    load      archive    the file is what it says; its fingerprint
    trace     interface, watch, plan, trace    one time step of the model as a function
    probe     probe, culprit    T calls of one step equal one call over T steps, or who is to blame
    convert   convert    that function as a LiteRT flatbuffer or a SavedModel
    check     check      the artefact computes what Keras does, and the same bits at every batch size
"""
