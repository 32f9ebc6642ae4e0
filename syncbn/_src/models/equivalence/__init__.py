"""Whether a model on several replicas does what it does on one, with the whole batch."""
