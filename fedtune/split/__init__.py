"""Cutting a model in three, and the service that runs its body for many clients."""
