"""How it is built. Private: only `syncbn`, `syncbn.training` and `syncbn.testing` are not."""
