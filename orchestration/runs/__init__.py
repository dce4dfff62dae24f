"""A run's directory: what it says of itself, how it is configured, shown, listed and sealed."""
