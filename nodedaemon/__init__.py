"""The node daemon: runs containers on one machine and passes requests to them.

Words, one meaning each. Those of the control plane (workspace, replica, task, attempt, slot) mean the same here.

* node: this machine; its address is that of the key in its state directory, and cannot be chosen.
* session: from one Login to the end of its Heartbeat stream. Reports go up (all that is), assignments come down (all
  that should be). A lost session is begun anew for ever; containers know nothing of it.
* assignment: a replica that should run here. `replicas` makes it so with an engine.
* engine: what runs containers: Docker, or plain processes where there is no Docker.
* attempt: one HTTP exchange with one replica's container, given by a Start and ended by a Result. Sessions come and go
  under it.
* delivery: how far an attempt got (not sent, sent partly, sent, answered). Known, never guessed.
* spool: what was done and is not yet acknowledged: results, and bodies too large to ride inside them.
* journal: which attempts a container has seen, so that a daemon that was killed can say so when it is back.
* keeper: a process that holds connections to containers over the daemon's death. An errand is what one was sent for.

Reading order: `__main__` wires it all; `session` holds the control plane's hand; `execute` takes starts and gives
results, `relay` (over `connection` and `http1`) does each exchange, `bulk` moves large bodies, `spool` and `journal`
remember, `held` (with `errand` and `keeper`) has connections outlive the daemon.
"""
