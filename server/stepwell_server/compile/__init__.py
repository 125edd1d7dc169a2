"""From a ``.keras`` file to a `Program`, in a process of its own.

The server has a `warm.WarmCompiler` and never loads TensorFlow. Its processes: ``python -m stepwell_server.compile``, the
fork server, which imports TensorFlow once (`__main__`); and copies of it, the workers (`worker`), each for one model,
which speak with the server by `wire` and can do little (`sandbox`). `processes` starts and ends them, `handover` gives them
a copy of the user's file, `limits` has what they may take. A worker's stages, each a module or two:

    load      archive    the file is what it says; its fingerprint
    trace     interface, causality/, watch, plan, trace    the graph proves that it may be stepped; one
              time step of the model as a function
    probe     probe, samples, evidence    T calls of one step equal one call over T steps, on samples
    convert   convert    that function as a LiteRT flatbuffer or a SavedModel
    check     check      the artefact computes what Keras does; engine.executors.trial: and the same bits at every
              batch size

What comes of it is a file of `program_file`. It goes into the cache; `stepwell compile` hands it out.
"""
