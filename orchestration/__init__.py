"""What a person starts: the command line, the driver loops, tracking and reports."""
