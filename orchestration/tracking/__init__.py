"""MLflow: what it is told, kept until it has been told, and the server."""
