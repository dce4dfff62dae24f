"""What runs on Ray, one role a file: thin shells that hold a model and call down. No maths."""
