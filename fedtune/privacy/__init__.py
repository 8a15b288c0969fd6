"""What can be learned of a single site, bounded: masks under which only sums can be read, noise, and a ledger
of what it leaves to be learned."""
