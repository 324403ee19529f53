"""The documented JSON/REST surface of NGPU over HTTP; inside, a gRPC client of the control plane and nothing else.

A request's way, file by file: `connection` drives it, with aiohttp for what is not `plain`; `app` finds its handler,
`credentials` says who calls, `params` what is asked, `bodies` reads what was sent, `envelope` takes the payload out of
it, `calls` and `batch` ask the control plane, `envelope` wraps the answer, `reply` writes it. `submit` gives work,
`tasks` asks after it. `errors` holds every way to be refused.

Stateless: whatever must survive is in the control plane, so any number of bridges may stand beside one another.
The original's odd words (`taskID`, `task_dursion`, `recordDursion`) live in this package alone; docs/rest.md has them
all, with the rulings where the original's documents contradict themselves.
"""
