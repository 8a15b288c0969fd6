"""Payloads between sites and coordinator: our own gRPC service, under mutual TLS, with signed uploads and receipts."""

from fedtune.exchange.client import ExchangeClient
from fedtune.exchange.desk import Desk
from fedtune.exchange.limits import Limits
from fedtune.exchange.service import Server, serve

__all__ = ["Desk", "ExchangeClient", "Limits", "Server", "serve"]
