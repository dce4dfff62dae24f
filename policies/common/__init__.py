"""What several experiments need: intervals, seeds, search spaces."""
