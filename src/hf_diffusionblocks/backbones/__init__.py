"""The architectures that can be converted, a file each; [`base`](base.py) says what one brings."""
