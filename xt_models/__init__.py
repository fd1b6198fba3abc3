"""Models for very large images."""
