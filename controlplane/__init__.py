"""The control plane: decides and remembers.

Words, one meaning each. Workspace: what a customer brought (image, command, GPUs, ports). Replica: one container of a
workspace on one node. Node: a machine with GPUs; node daemon: our program there. Task: one HTTP exchange a user asked
for. Attempt: one placement of a task. Slot: room for one task on one replica. Session: one login of a node, until a
newer one. Lease: what makes one of several control planes the active one; the others stand by. Placement: choosing
nodes for replicas; routing: choosing the slot for a task; filter, score, refusal. Desired: what should be; reported:
what is. Drain: take nothing new, finish what runs. Cordon: place nothing new.

Life of a task:
 1. A caller passes the gate (`api.gate`: who, and may they) with Schedule, alone or in a Batch.
 2. `api.tasks` finds its workspace, or route, and checks method, path, headers, sizes, and the BTC address's assets.
 3. The dispatcher puts it at the end of its workspace's queue and asks `routing` which free slot gets it.
 4. A slot is free: the row is written as running, and its start leaves in the next frame of that node's Execute stream.
    None is: the row is written as queued, and step 3 comes again with the next free slot.
 5. The node passes the request to the container. Bodies over 64 KiB travel beside it: Upload, Fetch, Deliver, Watch.
 6. The result comes back on the same stream, or the node is lost: then known facts say whether it may run elsewhere.
 7. The store writes the end, once, and the attempt into the ledger, many of them in one commit.
 8. Only now the waiting caller is answered, and the node is told to forget the attempt.
 9. Later callers read the rows: Query, GetDetail, ListTasks. A watcher follows the body as it comes.
10. After their retention the bodies go; the rest of the row stays.
"""
