"""The synchronized layers."""
