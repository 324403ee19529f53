"""Whose tasks a call is about, and whether they are the caller's."""

from controlplane.access import WORKSPACE_PREFIX, Kind, Principal
from controlplane.dispatcher import Dispatcher, TaskView
from controlplane.errors import InvalidArgument, NotFound
from controlplane.fleet import Fleet


class Owners:
    """Another's task or workspace is NotFound, whether it exists or not."""

    def __init__(self, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher

    def workspace_uid(self, workspace_id: str, principal: Principal) -> str:
        """The uid of the workspace that is named, or that calls. Raises NotFound, InvalidArgument.

        Only ids are taken, never names: a bridge passes on what its caller sent as credential.
        """
        if principal.kind is Kind.WORKSPACE and not workspace_id:
            return principal.id
        if not workspace_id:
            raise InvalidArgument("workspace_id: is missing; say which workspace (with `ngpu`: -w NAME).")
        uid = self._fleet.workspace_of(workspace_id.removeprefix(WORKSPACE_PREFIX))
        if uid is None or (principal.kind is Kind.WORKSPACE and uid != principal.id):
            raise NotFound("There is no such workspace.")
        return uid

    def owner(self, workspace_id: str, principal: Principal) -> str:
        """The uid of the workspace whose a task must be; empty: the task's id alone opens it. Raises NotFound."""
        return self.workspace_uid(workspace_id, principal) if principal.kind is Kind.WORKSPACE or workspace_id else ""

    def proven(self, workspace_id: str, principal: Principal, why: str) -> str:
        """As `owner`, where a task's id alone opens nothing; empty: an operator asks. `why` completes the error.

        Raises NotFound, InvalidArgument (a service without `workspace_id`).
        """
        owner = self.owner(workspace_id, principal)
        if not owner and principal.kind is not Kind.OPERATOR:
            raise InvalidArgument(f"workspace_id: is missing; {why}.")
        return owner

    async def task(self, task_id: str, workspace_id: str, principal: Principal) -> TaskView:
        """The task as it is, if the caller may see it. Raises NotFound."""
        owner = self.owner(workspace_id, principal)
        view = await self._dispatcher.query(task_id)
        if owner and view.workspace_uid != owner:
            raise NotFound
        return view
