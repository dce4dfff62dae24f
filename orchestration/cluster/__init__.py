"""The Ray that a run lives on, jobs on a cluster, and what could be in the way."""
