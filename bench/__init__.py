"""Every figure here comes from one run in which all contenders did the same work in turn.

**How a figure is made.** Each case (one contender, one work, one size) runs in a process of its own, with a small
environment and as many descriptors as the system allows. It warms up, lets the children that it has started come to
rest, and then reads the clocks around the work alone. All contenders of a work do it once in each round, in a new order
each time. A cell shows the median of the rounds, and in parentheses the lowest and the highest. A ratio is taken within
each round, between two runs that are seconds apart; its median is told, not the ratio of two medians. *native* is
what is native to the contender's loop: `trio.Process` on trio, asyncio's own processes with `PidfdChildWatcher`,
uvloop's own.

- *CPU* is the time of this process, of all its threads, user and system. The children's is not in it.
- *Latency* (p50, p99) runs from the last instruction of the child, which writes the time into a pipe before it exits,
  to the next one of the task that waited for it.
- *gap* is by how much a task that sleeps for 5 ms again and again was late, at the worst.
- *KiB/child* is resident memory, with the task that waits, which is the larger part: see *waiting for nothing*.
- By pid, or by itself: anyreap watches children that `os.posix_spawn` started; with *open_process* it starts them,
  as trio, anyio, asyncio, uvloop, Twisted and gevent start theirs.
- *C* is what the kernel alone costs: `posix_spawn`, an epoll of pidfds, `wait4`.

**What it does not show.** How a program feels that does something else besides. Machines with many cores: the children
share the cores with the one that waits, so wall-clock times, `exits/s` above all, are about the children too, and swing
more than CPU does. Other kernels. What a contender does for its price: most of them neither notice a stolen status, nor
end what was started. Blocking contenders (C, Python, psutil) let nothing else go on meanwhile.

A contender that fails, or takes too long, is listed with its reason.
"""
