"""The implementation. Private: only `syncbn`, `syncbn.training` and `syncbn.testing` are public."""
