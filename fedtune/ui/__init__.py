"""Pages of a folder of runs in a browser, read only, on this machine, while the runs go on."""
