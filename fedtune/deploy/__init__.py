"""Real programs: a coordinator and its sites, each looked after by one process (server.py, client.py).

coordinator's machine                                        a site
fedtune server                                               fedtune client
  gateway    exchange, fleet proxy, body service  <-- TLS --  fleet proxy, worker's uploads
  SuperLink  Flower's, on loopback only                        SuperNode  Flower's, speaks to the fleet proxy
  SuperExec  starts the ServerApp: the run                     SuperExec  starts a ClientApp a message
                                                               worker     holds model and data, does the work
"""
