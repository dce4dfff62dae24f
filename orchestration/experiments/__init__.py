"""What a person can run: one package an experiment, with its page in ``loop``."""
