"""Reading and rewriting the ATen graph."""
