"""Models, data and files: all that computes with diffusers, transformers and images, without Ray or MLflow."""
