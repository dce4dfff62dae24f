"""Long measurements: each is a command that can be interrupted, run again, and prints its figures with the commit."""
