"""A Keras model as a TensorFlow graph: its interface, its plan, and one time step of it as a function."""
