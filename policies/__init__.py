"""The science: pure torch and numpy. Imports neither Ray, MLflow nor the other packages."""
