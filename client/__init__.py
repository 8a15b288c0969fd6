"""A site's door."""
