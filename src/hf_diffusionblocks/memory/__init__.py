"""What a training step holds, measured and foretold."""
