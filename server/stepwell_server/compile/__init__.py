"""Compiles a ``.keras`` file into a `Program`, in a separate process.

The server uses `host.compiler.WarmCompiler` and never loads TensorFlow. The folders, from the process to the proof:

    host/        the fork server, which imports TensorFlow once; its workers, each for one model; their sandbox and limits
    program/     `pipeline`: the stages in order; conversion to a LiteRT flatbuffer or a SavedModel; recompiling a model
                     with other weights
    probe/       T calls of one step equal one call over T steps, on samples; the artefact computes what Keras does
    causality/   the proof from the graph that the model can be stepped
        keras_file/  checks of the file; its fingerprint
    graph/       the model's interface, its plan, and one time step of it as a function

A worker's stages are load (keras_file), trace (causality, graph), probe, convert and check (program, probe;
engine.executors.trial: the same bits at every batch size). The result is a `program_file`, which goes into the
`cache`; `stepwell compile` writes it to a file.
"""
