"""Compares Keras models without their weights and generated names. Reads configurations; does not import Keras."""
