"""The whole surface in one table: path, method, what answers."""

from httpbridge.about import About
from httpbridge.app import AnyMethod, Route
from httpbridge.lookups import Lookups
from httpbridge.raw import OPERATION, Raw
from httpbridge.submit import Submission
from httpbridge.tasks import Tasks


def routes(submission: Submission, tasks: Tasks, lookups: Lookups, about: About) -> dict[str, Route]:
    """Our own paths. Those under /user/ win over a container's path of the same name."""
    check_address = Route("checkAddress", {"GET": lookups.check_address})
    return {
        "/user/schedulingTask": Route("schedulingTask", {"POST": submission.scheduling_task}),
        "/user/queryTask": Route("queryTask", {"GET": tasks.query}),
        "/user/queryTaskList": Route("queryTaskList", {"GET": tasks.list}),
        "/user/getTasksFromNode": Route("getTasksFromNode", {"GET": tasks.list_of_node}),
        "/user/getDetailed": Route("getDetailed", {"GET": tasks.detailed}),
        "/user/getTask": Route("getTask", {"GET": tasks.task}),
        "/user/task": Route("task", {"DELETE": tasks.cancel}),
        "/user/queryNodes": Route("queryNodes", {"GET": lookups.nodes}),
        "/user/brc20/checkAddress": check_address,
        "/brc20/checkAddress": check_address,
        "/healthz": Route("healthz", {"GET": about.health}),
        "/readyz": Route("readyz", {"GET": about.ready}),
        "/metrics": Route("metrics", {"GET": about.metrics}),
        "/openapi.yaml": Route("openapi", {"GET": about.openapi}),
        "/docs": Route("docs", {"GET": about.docs}),
    }


def passthrough(submission: Submission) -> Route:
    """Every other path under /user/ is a container's."""
    return Route("passthrough", {"POST": submission.passthrough})


def raw(pass_through: Raw) -> AnyMethod:
    """Every path under /run/ is a container's, whatever the method."""
    return AnyMethod(OPERATION, pass_through.run)
