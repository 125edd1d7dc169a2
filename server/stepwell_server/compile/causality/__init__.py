"""The proof, from the traced graph, that a model may be stepped.

What admits a model is not a sample of its values but its graph. The whole model is traced twice on
sequences of different sizes, cut at its recurrent layers (`cut`). In every tensor the batch and the time
axis are followed (`axes`, `values`), operation by operation: each must be on the list of those that treat
every time step and every row by itself (`rules_*`). What mixes them, or is not on the list, is refused
with the layer at fault (`proof`, `refusals`).

May touch: TensorFlow and Keras, the model's `Interface`. Knows nothing of programs, samples or executors.
"""
