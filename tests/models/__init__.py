"""Which families of models work with which tasks, kinds and methods: tried on one tiny random model of each,
written to docs/models.md.

python -m tests.models [FAMILY ...]   tries all, or those named, and stores what came out in outcomes.json
(minutes)
python -m tests.regen models          writes the page from it
"""
