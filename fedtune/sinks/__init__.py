"""Where events go: a JSON lines file, the console, an HTML report."""
