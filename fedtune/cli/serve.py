"""fedtune serve: a run's language model behind OpenAI's interface, on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fedtune.cli.common import add_round
from fedtune.cli.waits import waiting
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet

TOKEN = "FEDTUNE_SERVE_TOKEN"
PORT = 8080


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "serve", help="serve a run's language model to OpenAI's clients, on this machine", description=__doc__
    )
    parser.add_argument("model", help="the folder of a run or of an adapter that fedtune export wrote")
    parser.add_argument(
        "--listen",
        default=f"127.0.0.1:{PORT}",
        metavar="HOST:PORT",
        help=f"port 0 takes a free one (default: 127.0.0.1:{PORT}); listening for others takes a token "
        f"in the environment variable {TOKEN}, and a proxy with TLS before it",
    )
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="of an answer, at most")
    add_round(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    host, _, port = options.listen.rpartition(":")
    host, token = host.strip("[]"), os.environ.get(TOKEN, "")
    if not host or not port.isdecimal() or int(port) > 65535 or options.tokens < 1:
        found = f"--listen {options.listen} --tokens {options.tokens}"
        raise FedtuneError("C103", found, "HOST:PORT, and 1 or more", "correct them")
    quiet()
    from fedtune.runtime.chat import talker
    from fedtune.serving.server import LOOPBACK, ModelServer

    if host not in LOOPBACK and not token:
        do = f"set {TOKEN} to a long random text, or listen on 127.0.0.1"
        raise FedtuneError("C103", f"--listen {options.listen} without a token", "a token", do)
    with waiting("reading the model"):
        model = talker(Path(options.model).expanduser().resolve(), options.round)
    with ModelServer((host, int(port)), model, options.tokens, token) as server:
        place = f"http://{host}:{server.server_port}/v1"
        print(f"{model.name} at {place} as model '{model.name}'; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
