"""The actors of a DDPO run, one role a file."""
