"""What is asked besides tasks: where a workspace is being distributed, and what assets an address holds."""

import re
from typing import Final

import msgspec
from ngpu.v1 import workspace_pb2

from httpbridge import credentials, envelope, params
from httpbridge.answers import SUCCESS_MSG
from httpbridge.app import Call
from httpbridge.calls import ControlPlane
from httpbridge.errors import BadRequest, BridgeError, Unauthorized
from httpbridge.reply import Reply

_DECIMAL: Final = re.compile(r"([0-9]{1,40})(?:\.[0-9]{1,40})?")


class NodeProgress(msgspec.Struct):
    """How far a workspace is on one node: `progress` 0 to 100 of image pull and start, `status` 1 once it serves."""

    node_addr: str = msgspec.field(name="nodeAddr")
    progress: int
    status: int


class Lookups:
    """`queryNodes` and `checkAddress`."""

    def __init__(self, control_plane: ControlPlane, *, require_auth: bool) -> None:
        self._control_plane = control_plane
        self._require_auth = require_auth

    async def nodes(self, call: Call) -> Reply:
        """`GET /user/queryNodes`."""
        workspace_id = credentials.workspace_id(call.request.headers)
        if not workspace_id:
            raise Unauthorized
        workspace = await self._control_plane.workspace(workspace_id, call.request_id)
        nodes: dict[str, NodeProgress] = {}
        for replica in workspace.replicas:
            serves = replica.state == workspace_pb2.REPLICA_STATE_READY
            node = nodes.setdefault(replica.node_addr, NodeProgress(replica.node_addr, 0, 0))
            # Of several replicas on one node the one that is furthest speaks for it.
            node.progress = max(node.progress, 100 if serves else min(replica.progress, 100))
            node.status = max(node.status, int(serves))
        answer = {"result_code": 200, "msg": SUCCESS_MSG, "result_size": len(nodes), "nodes": list(nodes.values())}
        return Reply(envelope.encode(answer))

    async def check_address(self, call: Call) -> Reply:
        """`GET /brc20/checkAddress?address=`."""
        if self._require_auth:
            workspace_id = credentials.workspace_id(call.request.headers)
            if not workspace_id:
                raise Unauthorized
            await self._control_plane.workspace(workspace_id, call.request_id)
        own, _ = params.split_query(call.query, frozenset({"address"}))
        address = credentials.btc_address(own.get("address", ""))
        if not address:
            raise BadRequest("address is missing: give a BTC address")
        holdings = await self._control_plane.check_address(address, call.request_id)
        exact = [holding.balance for holding in holdings]
        answer = {
            "exists": bool(exact),
            "names": [holding.ticker for holding in holdings],
            "balances": [_floor(balance) for balance in exact],
            "balancesExact": exact,
        }
        return Reply(envelope.encode(answer))


def _floor(balance: str) -> int:
    match = _DECIMAL.fullmatch(balance)
    if match is None:
        raise BridgeError
    return int(match[1])
