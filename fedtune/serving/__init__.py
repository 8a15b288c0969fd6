"""A run's language model behind OpenAI's interface, on this machine: chat, completions, models."""
