"""A run: its rounds, the cohort and what carries questions to clients, the journal, comparisons, and what can
be done with a finished one."""
