"""What a Keras model is apart from its weights and from the names that Keras made up. Reads configurations; imports no Keras."""
