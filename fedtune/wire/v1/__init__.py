"""Generated stubs of protos/fedtune/wire/v1; `python -m tests.regen` writes them."""
