"""What an attempt's receipt says beside what happened: whose it is, on which GPUs, at what price."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, Protocol

import msgspec

from controlplane.census import Node, Replica, Workspace
from controlplane.errors import NotFound
from controlplane.fragmentation import WHOLE
from controlplane.prices import Prices

#: Of a GPU model's name, as its node has it.
MODEL_CHARS: Final = 200


class Terms(msgspec.Struct, frozen=True):
    """On which terms an attempt runs.

    `gpu_model`: of its GPUs, with " + " between different ones. `price_nanos`: of a second of all of them together.
    `concurrency`: how many attempts may share them. `share`: thousandths of its GPU that its replica may use, if not
    all: of each second that an attempt holds the GPU so much counts.
    """

    account: str = ""
    gpu_model: str = ""
    price_nanos: int = 0
    concurrency: int = 1
    share: int = WHOLE


#: The terms of an attempt: workspace's uid, replica, node's address, GPU ids, when it was assigned.
TermsOf = Callable[[str, str, str, Sequence[str], datetime], Terms]


class Picture(Protocol):
    """What is asked of the fleet."""

    def workspace(self, key: str) -> Workspace: ...  # noqa: D102
    def node(self, key: str) -> Node: ...  # noqa: D102
    def replica(self, replica_id: str) -> Replica | None: ...  # noqa: D102


def free_of_charge(
    _workspace_uid: str, _replica_id: str, _node_addr: str, _gpu_ids: Sequence[str], _at: datetime
) -> Terms:
    """Terms where nobody keeps accounts."""
    return Terms()


class Tariff:
    """Finds an attempt's terms."""

    def __init__(self, fleet: Picture, prices: Prices) -> None:
        self._fleet = fleet
        self._prices = prices

    def terms(self, workspace_uid: str, replica_id: str, node_addr: str, gpu_ids: Sequence[str], at: datetime) -> Terms:
        """See TermsOf. What is not known any more is left empty, and costs nothing."""
        try:
            workspace = self._fleet.workspace(workspace_uid)
        except NotFound:
            return Terms()
        spec = workspace.spec
        # A replica of an earlier description keeps the GPUs that it had.
        replica = self._fleet.replica(replica_id)
        gpu = spec.gpu if replica is None else workspace.spec_at(replica.generation).gpu
        models = self._models(node_addr, gpu_ids)
        return Terms(
            account=spec.account,
            gpu_model=" + ".join(sorted(set(models))),
            price_nanos=sum(self._prices.nanos(model, at) for model in models),
            concurrency=spec.concurrency,
            share=gpu.share or WHOLE,
        )

    def _models(self, node_addr: str, gpu_ids: Sequence[str]) -> list[str]:
        if not gpu_ids:
            return []
        try:
            gpus = self._fleet.node(node_addr).inventory.gpus
        except NotFound:
            return []
        # The node's words: PostgreSQL takes no NUL.
        return [gpu.model[:MODEL_CHARS].replace("\0", "") for gpu in gpus if gpu.id in gpu_ids]
