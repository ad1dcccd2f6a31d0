"""Control messages: what the processes of a run say to one another beside their tensors.

A run has few of them (docs/operations.md counts them), and none goes through a collective over all processes: each of
those would keep a connection to every other. The processes of a machine speak to one `Node` over loopback; the
nodes are a tree, with at most `FAN` below each. The node belongs to the machine's agent (`zili launch`), or
where there is none to the machine's first process.

`links` carries messages, `node` is a machine's place in the tree, `keys` is torch's store on top of it, and `member` a
process's end of it. Only `keys` imports torch.
"""
