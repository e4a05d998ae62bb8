"""Models on disk: a file a block, whole or some of them, joined, and described."""
