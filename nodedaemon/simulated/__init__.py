"""A fleet on one machine: nodes with keys of their own and the daemon's real code, without GPUs and containers.

A simulated node is made of the same session, executor, relay, spool and replicas as a real one, and speaks to a real
control plane. Only what it stands on is imitated, behind the seams of a real node: `engine` (pulls that take time,
containers that are small HTTP servers), `gpus` (what a driver would say) and `line` (the network). `node` wires one,
`fleet` runs them all in one process, `faults` says what may happen to them, `door` is where they are told, `command`
what is typed.
"""
