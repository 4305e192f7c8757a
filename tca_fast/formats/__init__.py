"""Foreign checkpoint formats, one module each."""
