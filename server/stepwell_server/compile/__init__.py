"""From a ``.keras`` file to a `Program`, in a process of its own.

The server has a `host.compiler.WarmCompiler` and never loads TensorFlow. The folders, from the process to the proof:

    host/        the fork server, which imports TensorFlow once; its workers, each for one model; their sandbox and limits
    program/     `pipeline`: the order of the stages; conversion to a LiteRT flatbuffer or a SavedModel; a model again
                 with other weights
    probe/       T calls of one step equal one call over T steps, on samples; the artefact computes what Keras does
    causality/   the graph proves that the model may be stepped
    keras_file/  the file is what it says; its fingerprint
    graph/       the model's interface, its plan, and one time step of it as a function

A worker's stages are load (keras_file), trace (causality, graph), probe, convert and check (program, probe;
engine.executors.trial: the same bits at every batch size). The result is a file of `program_file`. It goes into the `cache`;
`stepwell compile` hands it out.
"""
