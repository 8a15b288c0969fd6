"""Many runs of one recipe: a grid or a search over settings, several seeds each, and a table."""
