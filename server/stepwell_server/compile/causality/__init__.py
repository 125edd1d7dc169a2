"""The proof, from the traced graph, that a model can be stepped.

Only its graph admits a model, never samples of its values. The whole model is traced twice on sequences of
different sizes, and an admitted one also on a far longer sequence, cut at its recurrent layers (`cut`). The proof
follows the batch and time axis of every tensor
(`axes`, `values`) through each operation. An operation must be on the list of operations that treat every time step
and every row independently (`rules`). Otherwise the model is refused, with the layer at fault (`proof`,
`refusals`).

May use TensorFlow, Keras and the model's `Interface`. Knows nothing of programs, samples or executors.
"""
