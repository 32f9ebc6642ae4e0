"""What is measured by itself, each with a command line of its own."""
