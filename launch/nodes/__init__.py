"""Several nodes as one job: how they connect, and how they end.

From top to bottom; a room imports only from rooms below it:

* measuring: `evenstep doctor --nodes`: nodes meet as those of a run, and measure their network.
  No torch.
* node: one node's part of a job on several nodes: rendezvous, local processes, end.
* secret_file: the secret of a rendezvous in a file that node 0 writes and the other nodes read.
  No torch.
* elastic: A job that continues with the nodes that are there: its generations, led by node 0.
* node_part: what one node does in a group of nodes: its processes, and the watch over the other
  nodes.
* rendezvous: rendezvous of the nodes of a job, and the connections between them while it runs.
* handshake: how two nodes prove to each other that they know the same secret. No torch.
"""
