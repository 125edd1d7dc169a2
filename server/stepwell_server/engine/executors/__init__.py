"""What runs a program: LiteRT by default, TensorFlow where LiteRT cannot."""
