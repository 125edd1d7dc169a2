"""Comparisons of a program with Keras's own call on samples. Samples only refuse."""
