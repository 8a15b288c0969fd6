"""Where fedtune meets Flower, and nowhere else: messages, nodes, apps and the simulation engine.

messages.py                     what is sent, and the loop that sends and awaits it
server_app.py, client_app.py    both ends of `flwr run` and of the simulation engine (simulation.py)
nodes.py                        a deployment's members at Flower's nodes; there Flower carries tickets only
coordinator_app.py, site_app.py both ends of a deployment
"""

import os

# Read when flwr and ray are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
