"""One time step of a model with operations that look back, such as causal convolutions.

The proof finds what each operation needs of the past (`causality.call.Need`). Here the graph that it followed, of many
time steps, becomes the function of one time step. Each operation is created again for one element of the time axis; what
it needs of earlier ones is a state, like that of a recurrent layer. Keras is not called again, so no layer has to work on
one time step.

May use the proof and the `Plan`. Knows nothing of samples or executors.
"""
