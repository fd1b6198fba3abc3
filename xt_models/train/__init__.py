"""Training: small examples on the public API that end in a table."""
