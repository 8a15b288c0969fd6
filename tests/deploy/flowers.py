"""Requests of a SuperNode, made with Flower's own classes: the oracle for what passes."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

from flwr.proto.error_pb2 import Error
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest

KEY = b"-----BEGIN PUBLIC KEY-----\nsite-a\n-----END PUBLIC KEY-----\n"
NODE, RUN = Node(node_id=2**63 + 5), 77
CONTENT = b"ConfigRecord  3\x00abc"
HASH = hashlib.sha256(CONTENT).hexdigest()
ABOUT = Metadata(
    run_id=RUN,
    src_node_id=NODE.node_id,
    dst_node_id=1,
    reply_to_message_id="b" * 64,
    message_type="train.ticket",
    ttl=9.5,
    created_at=1.7e9,
)
TREE = ObjectTree(
    object_id=HASH, children=[ObjectTree(object_id=HASH, children=[ObjectTree(object_id=HASH)])]
)
REQUESTS: dict[str, Any] = {
    "register-node": RegisterNodeFleetRequest(public_key=KEY),
    "activate-node": ActivateNodeRequest(public_key=KEY, heartbeat_interval=30.0),
    "deactivate-node": DeactivateNodeRequest(node_id=NODE.node_id),
    "unregister-node": UnregisterNodeFleetRequest(node_id=NODE.node_id),
    "send-node-heartbeat": SendNodeHeartbeatRequest(node=NODE, heartbeat_interval=30.0),
    "pull-messages": PullMessagesRequest(node=NODE),
    "push-messages": PushMessagesRequest(
        node=NODE,
        messages_list=[Message(metadata=ABOUT, error=Error(code=5, reason="gone"))],
        message_object_trees=[TREE],
        clientapp_runtime_list=[0.5],
    ),
    "get-run": GetRunRequest(node=NODE, run_id=RUN),
    "push-object": PushObjectRequest(
        node=NODE, run_id=RUN, object_id=HASH, object_content=CONTENT, session_id="s-1"
    ),
    "pull-object": PullObjectRequest(node=NODE, run_id=RUN, object_id=HASH),
    "confirm-message-received": ConfirmMessageReceivedRequest(node=NODE, run_id=RUN, message_object_id=HASH),
}


def body(name: str) -> bytes:
    return bytes(REQUESTS[name].SerializeToString(deterministic=True))


def headers(key: bytes = KEY, ahead: float = 0.0) -> dict[str, str]:
    when = datetime.fromtimestamp(datetime.now(UTC).timestamp() + ahead, UTC).isoformat()
    signed = {"flwr-public-key": b64encode(key).decode(), "flwr-timestamp": when, "flwr-signature": "c2ln"}
    return {
        "content-type": "application/protobuf",
        "accept": "application/x-protobuf",
        **signed,
        "flwr-package-version": "1.41.0",
    }
