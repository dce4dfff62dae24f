"""Real data: digits, image folders, prompts, and which of it a model may see."""
