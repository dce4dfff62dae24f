"""Files that appear whole or not at all: commits, results of tasks, where models lie."""
