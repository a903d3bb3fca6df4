"""Several nodes as one job: how they meet, and how they part.

From top to bottom; a room imports only from rooms below it:

* node: one node's part of a job on several: meet the others, run the local processes, part.
* rendezvous: where the nodes of a job meet before they train, and hold on to each other while
  they do.
* handshake: how two nodes prove to each other that they hold the same secret, on one connection.
  No torch.
"""
