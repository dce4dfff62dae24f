"""MLflow: the records it is sent, kept until they have arrived, and its server."""
