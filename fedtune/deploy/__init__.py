"""Real programs: a coordinator and its sites, each looked after by one process (server.py, client.py).

coordinator's machine                                        a site
fedtune server                                               fedtune client
  gate       exchange, fleet passage, body service  <-- TLS --  passage, worker's uploads
  SuperLink  Flower's, on loopback only                        SuperNode  Flower's, speaks to the passage
  SuperExec  starts the ServerApp: the run                     SuperExec  starts a ClientApp a message
                                                               worker     holds model and data, does the work
"""
