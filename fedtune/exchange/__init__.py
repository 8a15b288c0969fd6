"""Payloads between sites and coordinator: our own gRPC service, under mutual TLS, with signed uploads and
receipts."""

from fedtune.exchange.client import ExchangeClient
from fedtune.exchange.limits import Limits
from fedtune.exchange.server_store import ServerStore
from fedtune.exchange.service import Server, serve

__all__ = ["ExchangeClient", "Limits", "Server", "ServerStore", "serve"]
