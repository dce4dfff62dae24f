"""The pictures that runs leave behind, from plain arrays."""
