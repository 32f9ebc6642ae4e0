"""Studies beside the cases, each with its own command line."""
