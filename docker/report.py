"""Wait for the end of a run and print its table: report.py FOLDER. Exit code: the run's."""

import json
import sys
import time
from pathlib import Path

from fedtune.sinks.console import table

folder = Path(sys.argv[1])
result, failed = folder / "result.json", folder / "failed.json"
while not result.exists():
    if failed.exists():
        ended = json.loads(failed.read_text())
        sys.stderr.write(f"{ended['sentence']}\n")
        sys.exit(int(ended["exit_code"]))
    time.sleep(0.2)
found = json.loads(result.read_text())
sys.stdout.write(f"{table(found)}\n{'state_sha256':<34}{found['state_sha256']}\n")
