"""From a ``.keras`` file to a `Program`, in a process of its own.

The server calls `launch.compile_program` and never loads TensorFlow; ``python -m stepwell_server.compile``
is the compiling process. Its stages, each a module or two:

    load      archive    the file is what it says; its fingerprint
    trace     interface, causality/, watch, plan, trace    the graph proves that it may be stepped; one
              time step of the model as a function
    probe     probe, samples, evidence    T calls of one step equal one call over T steps, on samples
    convert   convert    that function as a LiteRT flatbuffer or a SavedModel
    check     check      the artefact computes what Keras does; engine.executors.trial: and the same bits at every
              batch size

What comes of it is a file of `program_file`. It goes into the cache; `stepwell compile` hands it out.
"""
