"""What a person starts: commands and experiments, and what they need of the cluster, of MLflow and of their files."""
