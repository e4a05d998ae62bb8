"""The models: their common trunk, and a folder a task."""
