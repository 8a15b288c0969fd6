"""The documentation: its site, and what its pages tell people to type."""
