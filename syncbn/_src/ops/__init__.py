"""Pure tensor functions: no Keras, no engine, no state."""
