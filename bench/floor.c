/* The floor: what the kernel alone costs. The same works as works.py, in C, with an epoll of pidfds where many are
 * watched, and the child that says when it ends. Prints one line of JSON; cases.py knows the arguments. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void check(long ok, const char *what)
{
    if (ok < 0) {
        perror(what);
        exit(1);
    }
}

static pid_t start(char *program, char *argument, int in, int out)
{
    char *argv[] = {program, argument, NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    posix_spawn_file_actions_init(&actions);
    if (in >= 0)
        posix_spawn_file_actions_adddup2(&actions, in, 0);
    if (out >= 0)
        posix_spawn_file_actions_adddup2(&actions, out, 1);
    check(-posix_spawn(&pid, program, &actions, NULL, argv, environ), "posix_spawn");
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static int watch(int epoll, pid_t pid)
{
    int fd = syscall(SYS_pidfd_open, pid, 0);
    struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = (uint64_t)pid << 32 | (uint32_t)fd};
    check(fd, "pidfd_open");
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
    return fd;
}

static int collect(int epoll)
{
    struct epoll_event events[1024];
    struct rusage usage;
    int n = epoll_wait(epoll, events, 1024, -1), status;
    check(n, "epoll_wait");
    for (int i = 0; i < n; i++) {
        check(wait4(events[i].data.u64 >> 32, &status, 0, &usage), "wait4");
        close((int)events[i].data.u64);
    }
    return n;
}

static void storm(int n, int limit)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC), running = 0, ended = 0, started = 0;
    for (int warm = 1; warm >= 0; warm--) {
        int64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        int total = warm ? limit : n;
        started = ended = running = 0;
        while (ended < total) {
            while (running < limit && started < total) {
                watch(epoll, start("/bin/true", NULL, -1, -1));
                running++, started++;
            }
            int some = collect(epoll);
            running -= some, ended += some;
        }
        wall = now(CLOCK_MONOTONIC) - wall, cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        if (!warm)
            printf("{\"exits/s\": %f, \"CPU/exit\": %f}\n", n * 1e9 / wall, cpu / 1e3 / n);
    }
}

static int gate(int pipes[2])
{
    check(pipe2(pipes, O_CLOEXEC), "pipe2");
    return open("/dev/null", O_WRONLY | O_CLOEXEC);
}

static void burst(int k)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC), pipes[2], null = gate(pipes);
    for (int i = 0; i < k; i++)
        watch(epoll, start("/bin/cat", NULL, pipes[0], null));
    usleep(300000);
    int64_t wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    close(pipes[1]);
    for (int ended = 0; ended < k;)
        ended += collect(epoll);
    wall = now(CLOCK_MONOTONIC) - wall, cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"CPU\": %f, \"wall\": %f}\n", cpu / 1e6, wall / 1e6);
}

static int ascending(const void *a, const void *b)
{
    return (*(const int64_t *)a > *(const int64_t *)b) - (*(const int64_t *)a < *(const int64_t *)b);
}

static void one(char *self, int k, int exits, int warm, int foreign)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC), pipes[2], in[2], out[2], null = gate(pipes);
    int64_t *late = calloc(exits, sizeof *late), cpus = 0, ended;
    siginfo_t info;
    if (foreign)
        check(waitid(P_PID, start("/bin/true", NULL, -1, -1), &info, WEXITED | WNOWAIT), "waitid");
    for (int i = 1; i < k; i++)
        watch(epoll, start("/bin/cat", NULL, pipes[0], null));
    check(pipe2(in, O_CLOEXEC), "pipe2");
    check(pipe2(out, O_CLOEXEC), "pipe2");
    usleep(300000);
    for (int i = -warm; i < exits; i++) {
        watch(epoll, start(self, "victim", in[0], out[1]));
        check(read(out[0], &ended, 1), "read");
        int64_t cpu = now(CLOCK_PROCESS_CPUTIME_ID);
        check(write(in[1], "", 1), "write");
        collect(epoll);
        int64_t at = now(CLOCK_MONOTONIC);
        cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        check(read(out[0], &ended, sizeof ended), "read");
        if (i >= 0)
            late[i] = at - ended, cpus += cpu;
    }
    qsort(late, exits, sizeof *late, ascending);
    printf("{\"p50\": %f, \"p99\": %f, \"CPU/exit\": %f}\n", late[exits / 2] / 1e3, late[exits * 99 / 100] / 1e3,
           cpus / 1e3 / exits);
    close(pipes[1]);
}

/* A child that says that it is there, waits for a byte, and says the time as the last thing it does. */
static void victim(void)
{
    char go;
    check(write(1, "", 1), "write");
    if (read(0, &go, 1) != 1)
        _exit(1);
    int64_t t = now(CLOCK_MONOTONIC);
    _exit(write(1, &t, sizeof t) != sizeof t);
}

int main(int argc, char **argv)
{
    int number[4] = {0};
    for (int i = 2; i < argc && i < 6; i++)
        number[i - 2] = atoi(argv[i]);
    if (argc < 2)
        return 2;
    else if (!strcmp(argv[1], "victim"))
        victim();
    else if (!strcmp(argv[1], "storm"))
        storm(number[0], number[1]);
    else if (!strcmp(argv[1], "burst"))
        burst(number[0]);
    else if (!strcmp(argv[1], "one"))
        one(argv[0], number[0], number[1], number[2], number[3]);
    else
        return 2;
    return 0;
}
