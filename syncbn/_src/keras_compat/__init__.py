"""Keras 2 and Keras 3: all that differs between them."""
