"""The kernel: every wait, pidfd and signal-sending call of the package, and nothing else.

Nothing here remembers anything about a child, and nothing here blocks: each wait is `WNOHANG`. A child that is
traced may have a readable pidfd and still not be collectable, for as long as its tracer likes; one blocking call
would freeze the loop for that long.

Two ways to name a child. A *pid* is a number that the kernel gives to the next process once the child has been
collected, by whomever. A *pidfd* names one process for ever (Linux >= 5.4; `man 2 pidfd_open`), so wherever there is
one it is what we look through and what we signal through. Where there is none, the *identity* of a child, a number
that no other process has had since boot, is compared first.

Wait statuses are raw here (the 16 bits of `man 2 wait`); `ExitStatus` decodes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import signal
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_LINUX: Final = sys.platform == "linux"

# __WALL: also the children that were cloned with an exit signal other than SIGCHLD. Without it waitid() denies that
# they exist (ECHILD), and they would be called "not a child". Linux only; elsewhere there are none of the kind.
_WALL: Final = 0x40000000 if _LINUX else 0
_P_PIDFD: Final[int] = getattr(os, "P_PIDFD", 3)

# _IOWR(0xFF, 11, struct pidfd_info), the first version of the struct, 64 bytes (linux/pidfd.h, Linux >= 6.13; the
# exit status is there since 6.15): u64 mask, u64 cgroup, u32 pid, tgid, ppid, eight ids, s32 exit_code.
_INFO: Final = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO: Final = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT: Final = 1 << 3

_NO_PID: Final = -1
_NO_FD: Final = 0x7FFFFFFF

_usable: bool | None = None
_numbered: bool | None = None


def waits_can_peek() -> bool:
    """Whether this Python has `waitid`, without which no status can be looked at before it is taken."""
    return hasattr(os, "waitid") and hasattr(os, "WNOWAIT")


def pidfds_usable() -> bool:
    """Whether children can be named by pidfd here: probed once, then remembered.

    A kernel may lack them (ENOSYS), a sandbox may deny them (EPERM, ENOSYS), and Linux 5.3 opens them but can't wait
    on them (EINVAL). Android up to 11 kills a process that merely asks (SIGSYS), so there nobody asks.
    """
    global _usable
    if _usable is None:
        _usable = _probe()
    return _usable


def _probe() -> bool:
    # Asked with numbers that can't be right, so that no descriptor is needed, and running out of them is not taken for
    # a kernel without pidfds: EINVAL is the answer to the bad pid, EBADF the one to the bad pidfd.
    if not hasattr(os, "pidfd_open") or hasattr(sys, "getandroidapilevel"):
        return False
    try:
        os.close(os.pidfd_open(_NO_PID))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            return False
    try:
        os.waitid(_P_PIDFD, _NO_FD, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError as exc:
        return exc.errno == errno.EBADF
    return False


# There is no such process (ESRCH), or the number is that of a thread: EINVAL, and since Linux 6.9 ENOENT.
_NO_PROCESS: Final = (errno.ESRCH, errno.EINVAL, errno.ENOENT)


def open_pidfd(pid: int) -> int:
    """Open a pidfd for a process, close-on-exec; -1 where none can be had, for whatever reason.

    Running out of descriptors (EMFILE, ENFILE, ENOMEM) must not lose a child that already runs, so it is no error
    here: everything works without a pidfd, slower.

    Raises:
        ProcessLookupError: There is no such process, or the number names a thread.
    """
    if not pidfds_usable():
        return -1
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in _NO_PROCESS:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from exc
        return -1


# One descriptor in reserve while a reaper is open. A program that has run out of them can still hand in a child and
# have it told from every other process, and its block can still end what it owns: both take a descriptor for a moment.
_spare = -1
_OUT_OF_FDS: Final = (errno.EMFILE, errno.ENFILE)


def keep_spare() -> None:
    """Have a descriptor in reserve, if one can be had."""
    global _spare
    if _numbered is None and pidfds_usable():  # now, while there are descriptors to find out
        with contextlib.suppress(OSError), _moment(os.getpid()) as pidfd:
            _pidfds_numbered(pidfd)
    if _spare < 0:
        with contextlib.suppress(OSError):
            _spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def drop_spare() -> None:
    """Give it back."""
    global _spare
    fd, _spare = _spare, -1
    if fd >= 0:
        with contextlib.suppress(OSError):
            # Somebody may have closed it (`os.closerange`), and the number be another file's.
            if os.path.samestat(os.fstat(fd), os.stat(os.devnull)):
                os.close(fd)


@contextlib.contextmanager
def _moment(pid: int) -> Iterator[int]:
    """A pidfd for a moment, on the reserve if it must be."""
    spared = False
    try:
        fd = os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in _NO_PROCESS:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from exc
        if exc.errno not in _OUT_OF_FDS or _spare < 0:
            raise
        drop_spare()
        spared = True
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            keep_spare()
            raise
    try:
        yield fd
    finally:
        os.close(fd)
        if spared:
            keep_spare()


def look(pid: int, pidfd: int = -1) -> int | None:
    """Look at a child without consuming anything: its wait status once it has ended, None before.

    None too while it has ended but can't be collected yet (a tracer has it).

    Raises:
        ChildProcessError: It is not an unreaped child of ours.
    """
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL
    if pidfd >= 0:
        try:
            return _raw(os.waitid(_P_PIDFD, pidfd, flags))
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # EINVAL: a sandbox that came after the probe
                raise
            # Then by number; but whose it is now, once the child was collected by somebody else, is not ours to take.
            with contextlib.suppress(PermissionError):
                if not _send_through(pidfd, 0):
                    raise ChildProcessError(errno.ECHILD, os.strerror(errno.ECHILD)) from None
    try:
        return _raw(os.waitid(os.P_PID, pid, flags))
    except OverflowError:
        raise ChildProcessError(errno.ECHILD, os.strerror(errno.ECHILD)) from None


def look_any() -> tuple[int, int] | None:
    """Look at some child that has ended: (pid, wait status). The kernel keeps showing the same one, until that one
    is collected: a foreign zombie at the head hides all others.
    """
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
    except ChildProcessError:
        return None
    raw = _raw(found)
    return None if found is None or raw is None else (found.si_pid, raw)


def take(pid: int) -> tuple[int, resource.struct_rusage] | None:
    """Collect a child: (wait status, usage), or None if it can't be collected yet.

    By pid, because no wait call that Python has takes a pidfd and returns the usage. The caller has just looked at
    this very zombie, and a zombie keeps its number until it is collected.

    Raises:
        ChildProcessError: It is not an unreaped child of ours.
    """
    taken, raw, usage = os.wait4(pid, os.WNOHANG | _WALL)
    return (raw, usage) if taken == pid else None


def take_stop(pid: int) -> int | None:
    """The signal that a child of ours has been stopped by; None if it has not, or if that was told already."""
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | _WALL)
    except ChildProcessError:  # it has ended in this moment: of a zombie the kernel tells no stop, but ECHILD
        return None
    return found.si_status if found is not None and found.si_pid == pid else None


def _raw(found: os.waitid_result | None) -> int | None:
    if found is None or found.si_pid == 0:
        return None
    if found.si_code == os.CLD_EXITED:
        return (found.si_status & 0xFF) << 8
    if found.si_code == os.CLD_KILLED:
        return found.si_status
    if found.si_code == os.CLD_DUMPED:
        return found.si_status | 0x80
    return None  # stopped, continued, trapped: not asked for, and not an end


def recall(pidfd: int) -> int | Literal["unknown", "later"]:
    """Read the wait status of a child that somebody else has collected back from its pidfd (Linux >= 6.15).

    "later": the kernel has not finished with it yet, ask again. "unknown": this kernel doesn't keep it.
    """
    if pidfd < 0:
        return "unknown"
    question = bytearray(_INFO.size)
    _INFO.pack_into(question, 0, _PIDFD_INFO_EXIT, *([0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, question)
    except OSError:  # ENOTTY: older than 6.13; ESRCH: collected, and older than 6.15
        return "unknown"
    mask, *_, raw = _INFO.unpack(question)
    return int(raw) if mask & _PIDFD_INFO_EXIT else "later"


def identify(pid: int, pidfd: int = -1) -> int | None:
    """Return a number that tells a process from every other one since boot; None if it can't be had.

    Linux >= 6.9: the inode of its pidfd, which is never used again. Else its start time, in clock ticks since boot
    (`man 5 proc_pid_stat`): a pid comes round again only after all others, which takes longer than a tick. Else
    nothing.
    """
    if pidfd >= 0:
        numbered = _pidfds_numbered(pidfd)
        if numbered:
            return os.fstat(pidfd).st_ino
        return None if numbered is None else start_time(pid)
    if not pidfds_usable():
        return start_time(pid)
    try:
        with _moment(pid) as fd:
            return identify(pid, fd)
    except ProcessLookupError:
        return None
    except OSError:
        return start_time(pid) if _numbered is False else None


def _pidfds_numbered(pidfd: int) -> bool | None:
    # Before pidfs (Linux 6.9) all pidfds share the one inode of all anonymous files, such as this eventfd; since then
    # they are on a file system of their own. None: out of descriptors, so ask again.
    global _numbered
    if _numbered is None:
        try:
            other = os.eventfd(0)
        except OSError:
            return None
        try:
            _numbered = os.fstat(pidfd).st_dev != os.fstat(other).st_dev
        finally:
            os.close(other)
    return _numbered


def stat_fields(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the third one (the state) on; empty if they can't be read."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except OSError:
        return []
    # The second field, the command, is in parentheses and may itself hold any byte, a parenthesis too.
    return line[line.rfind(b")") + 2 :].decode("ascii", "replace").split()


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot (`man 5 proc_pid_stat`); None if it can't be read."""
    fields = stat_fields(pid)
    return int(fields[19]) if len(fields) > 19 else None


def send(pid: int, pidfd: int, identity: int | None, signum: int) -> bool:
    """Send a signal to the process that was handed in, or to none: False if it is not there any more.

    Through its pidfd; without one, only if the process that has the pid now is the one that had it then. Where
    neither is possible (no pidfds and no /proc), only while it is an unreaped child of ours.

    Raises:
        PermissionError: It is there, and we may not signal it.
    """
    if pidfd >= 0:
        return _send_through(pidfd, signum)
    if not pidfds_usable():
        return _send_by_number(pid, identity, signum)
    try:
        with _moment(pid) as fd:  # out of descriptors is an error here: an unsent signal must not pass for a sent one
            if (
                identity is None
            ):  # it could not be had when the child was handed in: an unreaped child is all we can ask
                look(pid, fd)
            elif identify(pid, fd) != identity:
                return False
            return _send_through(fd, signum)
    except (ChildProcessError, ProcessLookupError):
        return False


def _send_by_number(pid: int, identity: int | None, signum: int) -> bool:
    # While it is an unreaped child of ours its number is not given to anybody else, so between the look and the kill
    # only another thread of this process could pull it away.
    try:
        if identity is not None and identify(pid) != identity:
            return False
        look(pid)
        os.kill(pid, signum)
    except (ChildProcessError, ProcessLookupError):
        return False
    return True


def _send_through(pidfd: int, signum: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    return True


def end_now(pid: int) -> None:
    """Kill and collect a child of ours that nobody knows of yet. The one call that waits: for a thread of ours."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.wait4(pid, _WALL)
    except (ChildProcessError, ProcessLookupError):
        pass


# Groups --------------------------------------------------------------------------------------------------------------

_PIDFD_SIGNAL_PROCESS_GROUP: Final = 1 << 2

_groups_usable: bool | None = None


def groups_usable() -> bool:
    """Whether a process group can be signalled through the pidfd of its leader (Linux >= 6.9): probed once.

    It can be then also after the leader was collected, and never hits a group that got the number later.
    """
    global _groups_usable
    if _groups_usable is None:
        _groups_usable = pidfds_usable() and _probe_groups()
    return _groups_usable


def _probe_groups() -> bool:
    try:
        signal.pidfd_send_signal(_NO_FD, 0, None, _PIDFD_SIGNAL_PROCESS_GROUP)
    except OSError as exc:
        return exc.errno == errno.EBADF  # else EINVAL: it does not know the flag
    return False


def send_group(pgid: int, pidfd: int, identity: int | None, signum: int) -> bool:
    """Send a signal to the group that a process leads or has led; False if there is no such group any more.

    Through the leader's pidfd. Without one, only while the leader is an unreaped child of ours, and the one that was
    handed in: as long as that zombie stands, nobody else can get the number.

    Raises:
        PermissionError: There is one, and we may not signal any of its members.
    """
    if pidfd >= 0 and groups_usable():
        try:
            signal.pidfd_send_signal(pidfd, signum, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except ProcessLookupError:
            return False
        return True
    try:
        look(pgid, pidfd)
        if pidfd < 0 and identity is not None and identify(pgid) != identity:
            return False
        os.killpg(pgid, signum)
    except (ChildProcessError, ProcessLookupError):
        return False
    return True


def live_members(pgids: Collection[int]) -> dict[int, list[int]]:
    """The pids of the members of process groups that are alive, by group; groups without one are left out.

    Read from /proc, because a signal that can be sent proves nothing: it can be to a zombie (`man 2 kill`), and one
    whose parent never collects it would keep the group "alive" for ever. Where there is no such /proc it has to do.
    All groups in one go, and a file is opened for their members only: it is a walk over the whole machine.
    """
    if not _LINUX:
        return {pgid: [pgid] for pgid in pgids}
    if not pgids:
        return {}
    spared = False
    try:
        try:
            return _members(pgids)
        except OSError as exc:
            if exc.errno not in _OUT_OF_FDS or _spare < 0:
                raise
        spared = True
        drop_spare()
        return _members(pgids)
    except OSError:  # no /proc, or no descriptor: not to know is no reason to leave somebody behind
        return {pgid: [pgid] for pgid in pgids}
    finally:
        if spared:
            keep_spare()


def _members(pgids: Collection[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            pid = int(name)
            try:
                pgid = os.getpgid(pid)
            except OSError:
                continue
            if pgid in pgids and _lives(stat_fields(pid)):
                found.setdefault(pgid, []).append(pid)
    return found


def _lives(fields: list[str]) -> bool:
    # A process whose first thread has ended is in state Z too while its others run: it has more than one then.
    return len(fields) > 17 and (fields[0] not in "ZXx" or int(fields[17]) > 1)


def leads_group(pid: int) -> bool:
    """Whether a process leads a process group."""
    try:
        return os.getpgid(pid) == pid
    except OSError:
        return False


# Orphans -------------------------------------------------------------------------------------------------------------

_RLIMIT_LOCKS: Final = 10
_TICKS: Final[int] = os.sysconf("SC_CLK_TCK")


def orphans_come_here() -> bool:
    """Whether orphaned descendants are given to this process: it is a subreaper, or the init of its pid namespace."""
    return os.getpid() == 1 or is_subreaper()


def no_subreaper() -> str:
    """Why this process can't find the orphans that it is given, in a sentence; "" if it can."""
    if not _LINUX:
        return "it takes PR_SET_CHILD_SUBREAPER, which only Linux has"
    try:
        shown = os.readlink("/proc/self")
    except OSError:
        shown = ""
    if shown != str(os.getpid()):
        return (
            "it takes a /proc that shows the processes of this pid namespace, and there is none: mount one"
            " (unshare --mount-proc)"
        )
    return ""


def ticks() -> int:
    """Now, on the clock and in the unit of a process's start time; 0 where there is none."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS) if _LINUX else 0


def ticks_in(seconds: float) -> int:
    """So many seconds in that unit, rounded up."""
    return -int(-seconds * _TICKS // 1)


def children() -> tuple[dict[int, bool | None], bool]:
    """List our children, zombies too.

    Returns:
        Their pids, each with whether the first thread is its parent (None: unknown); and whether the list is complete.
        The kernel walks while others change: where a child is collected, or a thread ends, the walk may skip somebody.
        If what was listed first still stands in front, in the same order, when it is listed again, nothing of that
        happened.
    """
    first, again = _children_by_thread("self"), _children_by_thread("self")
    if not again:  # a kernel without CONFIG_PROC_CHILDREN
        return dict.fromkeys(_children_by_scan()), True
    complete = first.keys() == again.keys() and all(again[task].startswith(first[task]) for task in first)
    main = str(os.getpid())
    found: dict[int, bool | None] = {}
    for listed in (again,) if complete else (first, again):
        for task, line in listed.items():
            found.update(dict.fromkeys(map(int, line.split()), task == main))
    return found, complete


def children_of(pid: int) -> list[int]:
    """The children of another process; none where the kernel does not list them."""
    return [int(child) for line in _children_by_thread(pid).values() for child in line.split()]


def _children_by_thread(pid: int | str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb", buffering=0) as file:
            found[task] = file.readall()
    return found


def _children_by_scan() -> list[int]:
    mine = str(os.getpid())
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and stat_fields(int(name))[1:2] == [mine]]


# A mark that can be put on a process from outside, that whatever it starts from then on inherits, across fork, exec,
# setsid and setuid, and that can be read from anybody, a zombie too. The kernel has nothing that is made for it, and
# one thing that serves: each process has a limit of file locks, which no Linux since 2.4.25 has looked at
# (`man 2 getrlimit`). Only the soft limit is set; who wants to can set it back.


def mark(pid: int, number: int) -> bool:
    """Mark a process; False if it could not be, or was already.

    It can't where it runs as another user and we lack CAP_SYS_RESOURCE.
    """
    try:
        soft, hard = resource.prlimit(pid, _RLIMIT_LOCKS)
        if soft != number:
            resource.prlimit(pid, _RLIMIT_LOCKS, (number, hard))
    except (OSError, ValueError, AttributeError):  # gone, not permitted, a hard limit below it; or no such function
        return False
    return soft != number


def mark_of(pid: int) -> int:
    """The mark of a process; 0 if it has none, or is gone."""
    # From /proc and not with prlimit(2), which needs the right to set it.
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:
            for line in file:
                if line.startswith(b"Max file locks"):
                    soft = line.split()[3]
                    return int(soft) if soft.isdigit() else 0
    except OSError:
        pass
    return 0


def environment_of(pid: int) -> bytes | None:
    """The environment that a process was started with; None if it is not there, or not for us to read.

    A zombie has none any more, and one that wrote its title over it has only what that left.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read()
    except OSError:
        return None


def has_arguments(pid: int) -> bool:
    """Whether a process shows arguments. Each one that lives has some, but in the middle of its exec: the kernel shows
    neither them nor the environment before the new program is in place (mm->env_end).
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def fd_budget() -> int:
    """How many pidfds all reapers of this process may hold together: half of the soft RLIMIT_NOFILE."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft // 2


def ignored_statuses() -> str:
    """Why the kernel would discard the statuses of our children, as far as it shows; "" if it doesn't."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN or signal_set("SigIgn", signal.SIGCHLD):
        return "SIGCHLD is ignored, and the kernel discards the statuses of children then (man 2 wait)"
    return ""


def signal_set(name: str, signum: int, of: str = "self") -> bool:
    """Whether a signal is in one of the sets of `/proc/self/status`, or of a thread: SigIgn, SigCgt, SigBlk."""
    try:
        with open(f"/proc/{of}/status", "rb") as file:
            for line in file:
                if line.startswith(name.encode() + b":"):
                    return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    except OSError:
        pass
    return False


def others_handle(signum: int) -> bool:
    """Whether another thread is in the C part of a signal's handler (of the first 32 threads).

    It runs with the signal blocked (`man 2 sigaction`), and never sleeps. A thread that blocks the signal for good
    mostly does.
    """
    own = str(threading.get_native_id())
    try:
        others = [tid for tid in os.listdir("/proc/self/task")[:32] if tid != own]
    except OSError:  # this is not Linux
        return False
    return any(_runs(tid) and signal_set("SigBlk", signum, f"self/task/{tid}") for tid in others)


def _runs(tid: str) -> bool:
    try:
        with open(f"/proc/self/task/{tid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"R")
    except OSError:  # it has ended
        return False


# This process among others (Linux; man 2 prctl) ----------------------------------------------------------------------

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37


def is_subreaper() -> bool:
    """Whether orphans among our descendants are given to this process, though it is not PID 1."""
    bit = ctypes.c_int(0)
    try:
        _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(bit))
    except OSError:
        return False
    return bool(bit.value)


def set_subreaper(*, on: bool) -> None:
    """Have orphans among our descendants given to this process, or not. Kept over an exec, not inherited by a fork.

    Raises:
        OSError: The kernel can't (Linux < 3.4), or a sandbox forbids it.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(on))


def set_parent_death_signal(signum: int) -> None:
    """Have a signal sent to this process when the thread that started it ends.

    Raises:
        OSError: A sandbox forbids it.
    """
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signum))


def _prctl(option: int, argument: object) -> None:
    nothing = ctypes.c_ulong(0)
    if ctypes.CDLL(None, use_errno=True).prctl(option, argument, nothing, nothing, nothing):
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)} (prctl {option})")
