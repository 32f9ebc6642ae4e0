"""Keras 2/3 compatibility: all that differs between them."""
