"""The base model and what is trained on it: adapters of every kind, the local loop, scores and exports; torch
and peft live here."""
