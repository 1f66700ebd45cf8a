/* Late writes on demand, inside a real tgtd (LD_PRELOAD).
 *
 * A write whose first bytes are "SLOW" was admitted by the target but does not land yet: the state in
 * which a fence, a redirect or a crash must not lose or resurrect data.
 *
 *   LATE_MS=n      hold each such write for n milliseconds
 *   LATE_GATE=f    hold each such write while the file f exists; for each one that starts to be held,
 *                  one byte is appended to the file f.held, so that a test can wait for it
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static ssize_t (*real_pwrite64)(int, const void *, size_t, off64_t);

static void hold(void)
{
    const char *ms = getenv("LATE_MS");
    const char *gate = getenv("LATE_GATE");

    if (ms)
        usleep((useconds_t)atoi(ms) * 1000);
    if (gate && !access(gate, F_OK)) {
        char held[4096];
        snprintf(held, sizeof held, "%s.held", gate);
        int fd = open(held, O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (fd >= 0) {
            if (write(fd, "x", 1) != 1)
                perror("late_write: marker");
            close(fd);
        }
        while (!access(gate, F_OK))
            usleep(2000);
    }
}

ssize_t pwrite64(int fd, const void *buf, size_t len, off64_t off)
{
    if (!real_pwrite64)
        *(void **)&real_pwrite64 = dlsym(RTLD_NEXT, "pwrite64");
    if (len >= 4 && !memcmp(buf, "SLOW", 4))
        hold();
    return real_pwrite64(fd, buf, len, off);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t off)
{
    return pwrite64(fd, buf, len, off);
}
